"""The training loss by noise level: sums over bins of log-SNR, kept on the device."""

from typing import Any

import torch
from torch import Tensor

# Edges of the bins, from noise to image; the first and the last bin also take all that lies beyond. The same for every
# schedule, so that their losses can be compared.
EDGES = tuple(range(-12, 17))
CENTRES = tuple(low + 0.5 for low in EDGES[:-1])


class NoiseLevels:
    """Sum of losses and number of images in each bin since the last reset.

    `update` is a fixed sequence of kernels on tensors that stay in place, with no sync and no atomic addition: it can
    be captured in a CUDA graph, and gives the same sums every time.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.loss = torch.zeros(len(CENTRES), dtype=torch.float64, device=device)
        self.images = torch.zeros_like(self.loss)
        self._bins = torch.arange(len(CENTRES), device=device)

    def update(self, log_snr: Tensor, loss: Tensor) -> None:
        """Add images: their log-SNRs (N,), infinite ones too, and their losses (N,); one that is not finite is left
        out."""
        nearest = (log_snr.floor() - EDGES[0]).clamp(0, len(CENTRES) - 1)
        chosen = (nearest[:, None] == self._bins) & loss.isfinite()[:, None]
        self.loss += torch.where(chosen, loss.detach().double()[:, None], 0.0).sum(0)
        self.images += chosen.sum(0)

    def state_dict(self) -> dict[str, list[float]]:
        """The sums, for a checkpoint. Waits for the device."""
        return {"loss": self.loss.tolist(), "images": self.images.tolist()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Continue the sums of `state_dict`, exactly."""
        self.loss.copy_(torch.tensor(state["loss"], dtype=torch.float64))
        self.images.copy_(torch.tensor(state["images"], dtype=torch.float64))

    def read(self, *, reset: bool = True) -> dict[str, Any]:
        """Of each bin, from noise to image: `log_snr` (its centre), mean `loss` (None without images), `images`."""
        losses, images = torch.stack([self.loss, self.images]).tolist()
        if reset:
            self.loss.zero_()
            self.images.zero_()
        means = [loss / n if n else None for loss, n in zip(losses, images, strict=True)]
        return {"log_snr": list(CENTRES), "loss": means, "images": [int(n) for n in images]}

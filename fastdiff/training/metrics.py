"""What is counted of each training step, kept on the device: loss and gradient norm, and the loss by noise level."""

import math
from typing import Any

import torch
from torch import Tensor

# Edges of the bins, from noise to image; the first and the last bin also take all that lies beyond. The same for every
# schedule, so that their losses can be compared.
EDGES = tuple(range(-12, 17))
CENTRES = tuple(low + 0.5 for low in EDGES[:-1])


class Metrics:
    """Sums over the steps since the last reset, as device tensors that stay in place (a captured step adds to them).

    Steps whose loss or gradient is not finite are left out of the sums and counted instead.

    loss, grad_norm  the sums, float32
    bad_step         the step at which too many in a row were not finite, or -1
    skipped          how many were not finite, since the last reset
    in_a_row         how many of the latest
    """

    NAMES = ("loss", "grad_norm", "bad_step", "skipped", "in_a_row")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.loss = torch.zeros((), device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.count = 0  # of steps, on the host
        self._read: dict[str, float] | None = None  # what was read since the last step

    def add(self, loss: Tensor, grad_norm: Tensor, step: Tensor, *, allowed: int) -> None:
        """Count one step on the device; more than `allowed` in a row that are not finite are too many."""
        good = loss.isfinite() & grad_norm.isfinite()
        self.loss.add_(torch.where(good, loss, 0.0))
        self.grad_norm.add_(torch.where(good, grad_norm, 0.0))
        self.skipped.add_(~good)
        self.in_a_row.copy_(torch.where(good, 0, self.in_a_row + 1))
        too_many = (self.in_a_row > allowed) & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(too_many, step, self.bad_step))

    def step(self) -> None:
        """Count one step on the host."""
        self.count += 1
        self._read = None

    def transfer(self) -> list[float]:
        """All sums, in the order of NAMES, in one transfer (float64 holds each exactly). Waits for the device."""
        return torch.stack([getattr(self, name).double() for name in self.NAMES]).tolist()

    def state_dict(self) -> dict[str, float]:
        """The sums and `count`, for a checkpoint between two rows. Waits for the device, once a step."""
        if self._read is None:
            loss, grad_norm, *counts = self.transfer()
            self._read = dict(zip(self.NAMES, (loss, grad_norm, *map(int, counts)), strict=True))
        return {**self._read, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue the sums of `state_dict`, exactly; the first checkpoints have counted no skipped steps."""
        self._read = {name: state.get(name, 0) for name in self.NAMES}
        for name, value in self._read.items():
            getattr(self, name).fill_(value)
        self.count = int(state["count"])

    def means(self, *, reset: bool = True) -> dict[str, float]:
        """Mean `loss` and `grad_norm` of the steps since the last reset (NaN where none was finite), and `skipped`."""
        state = self.state_dict()
        if reset:
            self.load_state_dict({**state, "loss": 0.0, "grad_norm": 0.0, "skipped": 0, "count": 0})
        good = state["count"] - state["skipped"]
        means = {name: state[name] / good if good else math.nan for name in ("loss", "grad_norm")}
        return {**means, "skipped": state["skipped"]}


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

"""How well a network still denoises: the earliest sign that training for few steps goes wrong.

The loss compares the network with itself and may rise in a good run. The distance of samples comes late.
"""

import torch
from torch import Tensor, nn

from fastdiff.diffusion.objectives import Objective
from fastdiff.evaluation.graph_loop import Conditions

LEVEL = 0.3  # sigma / alpha, where a trained network misses about 1% of the variance of digits


class DenoisingError:
    """Mean squared error of the estimates of fixed images with fixed noise at sigma / alpha = LEVEL.

    Args:
        network: in eval mode; its weights may change in place.
        x0: (N, C, H, W), what the network works in.
        cond: what it is told about them.
        batch_size: how many it sees at a time; bounds the memory.
    """

    def __init__(
        self, network: nn.Module, objective: Objective, x0: Tensor, cond: Conditions, *, batch_size: int = 64
    ) -> None:
        self.network, self.objective, self.x0, self.cond = network, objective, x0, cond
        self.batch_size = batch_size
        log_snr = torch.full((len(x0),), LEVEL, dtype=torch.float64, device=x0.device).log() * -2
        self.t = objective.schedule.t_of_log_snr(log_snr)
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
        self.x_t = objective.add_noise(x0, self.t, eps).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self) -> float:
        """The error now. Waits for the device."""
        squares = []
        for first in range(0, len(self.x0), self.batch_size):
            part = slice(first, first + self.batch_size)
            cond = {name: value[part] for name, value in self.cond.items()}
            estimate = self.objective.denoise(self.network, self.x_t[part], self.t[part], **cond)
            squares.append((estimate - self.x0[part]).square().flatten(1).mean(1))
        return torch.cat(squares).mean().item()

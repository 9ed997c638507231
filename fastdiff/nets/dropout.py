"""Dropout whose masks two evaluations of a network can share."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff._kernels import dropout_factor_torch


class Dropout(nn.Module):
    """Dropout whose mask can be fixed by a seed: a pure function of seed, stream and position (kernels/philox.py).

    Args:
        p: probability that an element is set to 0, in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.stream = p, 0  # the stream sets a network's layers apart, see `tag_dropouts`

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W); seed: (1,) int64, or None for a mask from PyTorch's own generator."""
        if not self.training or self.p == 0:
            return x
        if seed is None:
            return F.dropout(x, self.p)
        return x * dropout_factor_torch(seed, x.shape, self.stream, self.p).to(x.dtype)


def tag_dropouts(net: nn.Module) -> None:
    """Give each Dropout of a network a stream of its own."""
    for i, layer in enumerate(m for m in net.modules() if isinstance(m, Dropout)):
        layer.stream = i

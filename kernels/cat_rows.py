"""Concatenation of many small matrices in a launch or two, within torch.compile.

PyTorch's own kernel takes up to 128 tensors of one dtype; Inductor, which would write a launch for each, does not look
into this operator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("fastdiff_kernels::cat_rows", mutates_args=())
def _cat_rows(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 1)


@_cat_rows.register_fake
def _(parts):
    return torch.cat(parts, 1)


def cat_rows(parts: Sequence[Tensor]) -> Tensor:
    """(N, C1), (N, C2), ... of any dtypes -> (N, C1 + C2 + ...), in their common dtype. Not differentiable."""
    return _cat_rows(list(parts))

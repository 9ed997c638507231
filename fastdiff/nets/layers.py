"""Layers of the U-Net. Activations are (N, C, H, W) in channels_last memory throughout."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import _kernels as kernels

Layer = TypeVar("Layer", bound=nn.Conv2d | nn.Linear)


class GroupNorm(nn.GroupNorm):
    """Parameters of a norm that `group_norm_silu` applies; `fused` chooses the Triton kernel."""

    fused = False


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None
    return layer.bias


class Conv2d(nn.Conv2d):
    """A convolution that may leave its bias to the norm that reads the result; see `Pending`."""

    leaves_bias = False

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        return self._conv_forward(input, self.weight, None if self.leaves_bias else self.bias)


class Linear(nn.Linear):
    """A linear layer that may leave its bias to the norm that reads the result; see `Pending`."""

    leaves_bias = False

    def forward(self, input: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out)."""
        return F.linear(input, self.weight, None if self.leaves_bias else self.bias)


def left_out(layer: Conv2d | Linear) -> list[Tensor]:
    """The bias, if the layer has not added it: one tensor or none."""
    return [_bias(layer)] if layer.leaves_bias else []


def half_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Weights that compute in bfloat16 under autocast: of convolutions and linear layers, but for biases left out."""
    return [
        p
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
        for p in m.parameters(recurse=False)
        if not (getattr(m, "leaves_bias", False) and p is m.bias)
    ]


class Pending(NamedTuple):
    """An activation as the terms whose sum it is: the next norm adds them as it reads them, so that takes no pass.

    branch      (N, C, H, W), what a layer gave
    shortcut    (N, C, H, W) around it, or None
    bias        (C,) or (N, C) that the layers left out; None if it is in the others
    """

    branch: Tensor
    shortcut: Tensor | None = None
    bias: Tensor | None = None


def whole(x: Pending) -> Tensor:
    """The sum, where a convolution reads it and no norm."""
    assert x.bias is None
    return x.branch if x.shortcut is None else x.shortcut + x.branch


Vector = Tensor | tuple[Tensor, Tensor]  # (C,), or two whose sum it is


class Shared(NamedTuple):
    """What all parts of a network need in one forward pass.

    embedding   (N, E), of the time, already through SiLU
    vectors     by a part's number: its `vectors()`, pairs as their sums; each (C,), or a row for each image (N, C)
    shifts      by a residual block's number: what the embedding adds to it, (N, c_out), with conv_1's bias; None: each
                block works it out by itself
    seed        (1,) int64 of the fused kernel's dropout; see `group_norm_silu`
    """

    embedding: Tensor
    vectors: Sequence[Sequence[Tensor]]
    shifts: Mapping[int, Tensor] | None = None
    seed: Tensor | None = None


class Part(Protocol):
    """A module that has norms, or leaves a bias to one. `number` is its place in `Shared`."""

    number: int

    def vectors(self) -> Sequence[Vector]:
        """(C,) parameters of what norms do: weight and bias of its own, and any bias that is left to the next one."""
        ...


def group_norm_silu(
    x: Tensor,
    norm: GroupNorm,
    weight: Tensor,
    bias: Tensor,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """GroupNorm of x + shift, SiLU unless `silu` is false, dropout: (N, C, H, W) -> (N, C, H, W), in the dtype of x.

    Every norm of the network comes through here or through `add_norm_silu`, where `fused` chooses its
    implementation. Statistics are float32 under autocast too.

    Args:
        x: (N, C, H, W), in channels_last memory.
        norm: groups, eps and implementation.
        weight, bias: the norm's, (C,), or with the fused kernel (N, C).
        shift: (N, C), added to every pixel first.
        dropout_p: probability that an element is set to 0, in [0, 1).
        seed, stream: fix the fused kernel's dropout mask: (1,) int64, needed for dropout_p > 0, and one number for each
            layer that shares the seed. PyTorch draws from its own generator instead.
    """
    if norm.fused:
        return kernels.group_norm_silu(
            x, weight, bias, norm.num_groups, norm.eps, shift=shift,
            activation="silu" if silu else "none", dropout_p=dropout_p, seed=seed, stream=stream,
        )  # fmt: skip
    if shift is not None:
        x = x + shift[:, :, None, None]
    y = F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    return F.dropout((F.silu(y) if silu else y).to(x.dtype), dropout_p)


def add_norm_silu(
    x: Pending, norm: GroupNorm, weight: Tensor, bias: Tensor, *, skip: Tensor | None = None, silu: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Form the sum that x is, with the channels of `skip` after its own, and its norm: -> norm, sum, sum (N, C, H, W).

    The sum is given out twice, for two uses of it: the fused kernel adds up their gradients, where a third would take a
    pass of its own. The arguments are those of `group_norm_silu`.
    """
    if norm.fused:
        return kernels.add_group_norm_silu(
            x.branch, weight, bias, norm.num_groups, norm.eps, residual=x.shortcut, skip=skip, shift=x.bias,
            activation="silu" if silu else "none",
        )  # fmt: skip
    total = whole(x) if skip is None else concatenate(whole(x), skip)
    return group_norm_silu(total, norm, weight, bias, silu=silu), total, total


class _Concatenation(torch.autograd.Function):
    """See `concatenate`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, skip: Tensor) -> Tensor:
        ctx.channels = [h.shape[1], skip.shape[1]]
        return torch.cat([h, skip], 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # ty: ignore[incompatible-method-override]
        return tuple(g.contiguous(memory_format=torch.channels_last) for g in gradient.split(ctx.channels, 1))


def concatenate(h: Tensor, skip: Tensor) -> Tensor:
    """Along the channels: (N, C1, H, W), (N, C2, H, W) -> (N, C1 + C2, H, W).

    The gradients are tensors of their own. Autograd's would be slices of one, which every convolution that gets them
    copies twice: for the gradients of its input and of its weight.
    """
    return _Concatenation.apply(h, skip)


def zeroed(layer: Layer) -> Layer:
    """Set weight and bias of a layer to zero, so that its residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class TimeEmbedding(nn.Module):
    """Sinusoids of the noise level, then a two-layer MLP: (N,) -> (N, 4 * channels) (Ho et al. 2020, appendix B)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        """t: (N,), about 0..1000, of any dtype; computed in the dtype of the weights."""
        half = self.channels // 2
        index = torch.arange(half, device=t.device, dtype=torch.float32)
        # Frequencies from 1 down to 1 / 10000; the divisor half - 1 is DDPM's.
        frequency = torch.exp(index * (-math.log(10000.0) / max(half - 1, 1)))
        angle = t.to(torch.float32)[:, None] * frequency
        embedding = torch.cat([angle.sin(), angle.cos()], 1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))


class _Sums(torch.autograd.Function):
    """a_1 ... a_n, b_1 ... b_n -> a_1 + b_1 ... a_n + b_n, by one kernel when compiled. Gradients of a pair share no
    memory: who clips those of parameters in place would else do so twice."""

    @staticmethod
    def forward(ctx: Any, *terms: Tensor) -> tuple[Tensor, ...]:
        n = len(terms) // 2
        return tuple(torch._foreach_add(terms[:n], terms[n:]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return *gradients, *torch._foreach_mul(gradients, 1.0)


def added(groups: Sequence[Sequence[Vector]]) -> list[list[Tensor]]:
    """The groups, with the sum of each pair in its place."""
    pairs = [v for group in groups for v in group if isinstance(v, tuple)]
    sums = iter(_Sums.apply(*(a for a, _ in pairs), *(b for _, b in pairs)) if pairs else ())
    return [[next(sums) if isinstance(v, tuple) else v for v in group] for group in groups]


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-Conv, + time embedding, GroupNorm-SiLU-Dropout-Conv, + shortcut (Ho et al. 2020, appendix B).

    Args:
        c_in, c_out: channels before and after; a 1x1 convolution is the shortcut where they differ.
        c_embedding: width of the time embedding.
        dropout: probability, in [0, 1).
    """

    number: int  # its place in `Shared`, and what sets its dropout masks apart from those of others

    def __init__(self, c_in: int, c_out: int, c_embedding: int, *, groups: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(groups, c_in, eps)
        self.conv_1 = Conv2d(c_in, c_out, 3, padding=1)
        self.embedding = nn.Linear(c_embedding, c_out)
        self.norm_2 = GroupNorm(groups, c_out, eps)
        self.dropout = dropout
        self.conv_2 = zeroed(Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def vectors(self) -> Sequence[Vector]:
        """See `Part`."""
        left: Sequence[Vector] = left_out(self.conv_2)
        if left and isinstance(self.shortcut, Conv2d):
            left = [(_bias(self.conv_2), _bias(self.shortcut))]
        return [self.norm_1.weight, self.norm_1.bias, self.norm_2.weight, self.norm_2.bias, *left]

    def keep_bias(self) -> None:
        """Add the last bias here: a convolution follows, which reads the sum without a norm."""
        for layer in (self.conv_2, self.shortcut):
            if isinstance(layer, Conv2d):
                layer.leaves_bias = False

    def forward(self, x: Pending, shared: Shared, skip: Tensor | None = None) -> tuple[Pending, Tensor]:
        """x: (N, C, H, W), to which `skip` adds channels up to c_in. Returns (N, c_out, H, W), and x as one tensor."""
        weight_1, bias_1, weight_2, bias_2, *left = shared.vectors[self.number]
        shift = self.embedding(shared.embedding) if shared.shifts is None else shared.shifts[self.number]
        h, total, kept = add_norm_silu(x, self.norm_1, weight_1, bias_1, skip=skip)
        h = group_norm_silu(
            self.conv_1(h), self.norm_2, weight_2, bias_2, shift=shift,
            dropout_p=self.dropout if self.training else 0.0, seed=shared.seed, stream=self.number,
        )  # fmt: skip
        return Pending(self.conv_2(h), self.shortcut(total), *left), kept


class _Split(torch.autograd.Function):
    """(N, sum of sizes) -> views (N, size), whose gradients are concatenated by one kernel; see `kernels.cat_rows`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return rows.split(sizes, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return kernels.cat_rows(gradients), None


def time_shifts(blocks: Sequence[ResidualBlock], embedding: Tensor) -> dict[int, Tensor]:
    """What the time embedding (N, E) adds to each block, by its number: (N, c_out), by one matrix product for all.

    With it goes the bias that the block's first convolution has left out.
    """
    weight = torch.cat([block.embedding.weight for block in blocks])
    bias = torch.cat([_bias(block.embedding) for block in blocks])
    (bias,) = _Sums.apply(bias, torch.cat([_bias(block.conv_1) for block in blocks]))
    shifts = _Split.apply(F.linear(embedding, weight, bias), [block.embedding.out_features for block in blocks])
    return dict(zip((block.number for block in blocks), shifts, strict=True))


def as_rows(vectors: Sequence[Sequence[Tensor]], n: int) -> list[list[Tensor]]:
    """Vectors (C,) spread to rows (n, C), views of one tensor: their gradients, one row an image, are added up at once.

    With a vector each norm would add up its own, two launches for 51 norms and another for each convolution's bias.
    """
    flat = [v for group in vectors for v in group]
    rows = iter(_Split.apply(torch.cat(flat).expand(n, -1), [len(v) for v in flat]))
    return [[next(rows) for _ in group] for group in vectors]


class _Chunks(torch.autograd.Function):
    """(..., 3 C) -> q, k and v, (..., C); `bias` (3 C,) is in already and gets its gradient here, by the same pass."""

    @staticmethod
    def forward(ctx: Any, merged: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        ctx.shape, ctx.dtype = merged.shape, bias.dtype
        return merged.chunk(3, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        merged, sums = kernels.merge_columns(*gradients)
        return merged.view(ctx.shape), sums.to(ctx.dtype)


class SelfAttention(nn.Module):
    """Single-head self-attention over the H * W positions, with a residual: (N, C, H, W) -> (N, C, H, W)."""

    number: int  # its place in `Shared`

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(Linear(channels, channels))

    def vectors(self) -> Sequence[Vector]:
        """See `Part`."""
        return [self.norm.weight, self.norm.bias, *left_out(self.out)]

    def keep_bias(self) -> None:
        """Add the last bias here: a convolution follows, which reads the sum without a norm."""
        self.out.leaves_bias = False

    def forward(self, x: Pending, shared: Shared) -> Pending:
        """x: (N, C, H, W); in channels_last memory the reshapes are views."""
        weight, bias, *left = shared.vectors[self.number]
        h, total, _ = add_norm_silu(x, self.norm, weight, bias, silu=False)
        n, c, height, width = h.shape
        h = h.permute(0, 2, 3, 1).reshape(n, 1, height * width, c)
        if self.norm.fused:
            qkv_bias = _bias(self.qkv)  # added by the product; its gradient is a result of _Chunks'
            q, k, v = _Chunks.apply(F.linear(h, self.qkv.weight, qkv_bias.detach()), qkv_bias)
        else:
            q, k, v = self.qkv(h).chunk(3, -1)
        h = self.out(F.scaled_dot_product_attention(q, k, v))
        h = h.reshape(n, height, width, c).permute(0, 3, 1, 2)
        return Pending(h, total, *left)

"""GroupNorm, SiLU and what stands around them in a U-Net, as one operator: read x once, write y once.

    y = dropout(silu(group_norm(x + shift) * (1 + scale) + offset))

`shift` (N, C) is the time embedding of a DDPM block (and a convolution's bias), `scale` and `offset` (N, C) are
adaptive group norm (Dhariwal and Nichol, 2021). Stock PyTorch under torch.compile moves about 32 bytes an element in
the backward of a channels_last GroupNorm; this operator needs 6, and 4 in the forward (bf16). The formulas are in
group_norm_math.py, the kernels in group_norm_forward.py and group_norm_backward.py.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.library import triton_op

from kernels.group_norm_backward import backward_loop, backward_tile, column_sums
from kernels.group_norm_forward import forward_loop, forward_tile
from kernels.launch import norm_tiles, runs_triton, sum_blocks, traceable
from kernels.philox import dropout_factor_torch, threshold_of
from kernels.spec import Case, Inputs, KernelSpec

Activation = Literal["silu", "none"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def reference(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5, *,
              shift: Tensor | None = None, scale: Tensor | None = None, offset: Tensor | None = None,
              activation: Activation = "silu", dropout_p: float = 0.0, seed: Tensor | None = None,
              stream: int = 0) -> Tensor:  # fmt: skip
    """The same in plain PyTorch, step by step in x's dtype; differentiable, any device, any strides."""

    def per_image(v: Tensor) -> Tensor:
        return v.to(x.dtype)[:, :, None, None]

    u = x if shift is None else x + per_image(shift)
    z = torch.group_norm(u, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        z = z * (1 + per_image(scale))
    if offset is not None:
        z = z + per_image(offset)
    y = torch.nn.functional.silu(z) if activation == "silu" else z
    if seed is not None and dropout_p > 0:
        y = y * dropout_factor_torch(seed, x.shape, stream, dropout_p).to(x.dtype)
    return y


def _wide(v: Tensor) -> Tensor:
    """The dtype of the statistics: float32, or float64 for float64 input (CPU only)."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def _normalise(x: Tensor, shift: Tensor | None, num_groups: int) -> Tensor:
    """x (N, C, H, W), shift (N, C) -> u (N, groups, m) in the dtype of the statistics."""
    u = _wide(x) if shift is None else _wide(x) + shift[:, :, None, None]
    return u.reshape(x.shape[0], num_groups, x.shape[1] // num_groups * x.shape[2] * x.shape[3])


def _affine(weight: Tensor, bias: Tensor, scale: Tensor | None, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """gamma and beta, (1 or N, C)."""
    one_plus = 1.0 if scale is None else 1 + _wide(scale)
    gamma, beta = _wide(weight)[None] * one_plus, _wide(bias)[None] * one_plus
    return gamma, beta if offset is None else beta + offset


def _forward_cpu(x, weight, bias, shift, scale, offset, seed, num_groups, eps, silu, dropout_p, stream):
    u = _normalise(x, shift, num_groups)
    mean = u.mean(-1, keepdim=True)
    rstd = (u - mean).square().mean(-1, keepdim=True).add(eps).rsqrt()
    gamma, beta = _affine(weight, bias, scale, offset)
    z = ((u - mean) * rstd).reshape(x.shape) * gamma[:, :, None, None] + beta[:, :, None, None]
    y = z * torch.sigmoid(z) if silu else z
    if seed is not None:
        y = y * dropout_factor_torch(seed, x.shape, stream, dropout_p)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last), mean.squeeze(-1), rstd.squeeze(-1)


def _backward_cpu(dy, x, weight, bias, shift, scale, offset, seed, mean, rstd, num_groups, silu, dropout_p, stream):
    """The formulas of group_norm_math.py, in tensors."""
    gz = _wide(dy)
    if seed is not None:
        gz = gz * dropout_factor_torch(seed, x.shape, stream, dropout_p)
    xhat = ((_normalise(x, shift, num_groups) - mean[..., None]) * rstd[..., None]).reshape(x.shape)
    gamma, beta = _affine(weight, bias, scale, offset)
    if silu:
        z = xhat * gamma[:, :, None, None] + beta[:, :, None, None]
        s = torch.sigmoid(z)
        gz = gz * (s * (1 + z * (1 - s)))
    a, b = (gz * xhat).sum((2, 3)), gz.sum((2, 3))  # (N, C)
    one_plus = 1.0 if scale is None else 1 + _wide(scale)

    def group_mean(v: Tensor) -> Tensor:  # (N, C) -> (N, C, 1, 1)
        per_group = v.shape[1] // num_groups
        sums = v.reshape(v.shape[0], num_groups, per_group).sum(-1) / (per_group * x.shape[2] * x.shape[3])
        return sums.repeat_interleave(per_group, 1)[:, :, None, None]

    dx = gamma[:, :, None, None] * gz - group_mean(gamma * b) - xhat * group_mean(gamma * a)
    dx = dx * rstd.repeat_interleave(x.shape[1] // num_groups, 1)[:, :, None, None]
    return (
        dx.to(x.dtype).contiguous(memory_format=torch.channels_last),
        (one_plus * a).sum(0).to(weight.dtype),
        (one_plus * b).sum(0).to(bias.dtype),
        x.new_empty(0) if shift is None else dx.sum((2, 3)).to(shift.dtype),
        x.new_empty(0) if scale is None else (_wide(weight) * a + _wide(bias) * b).to(scale.dtype),
        x.new_empty(0) if offset is None else b.clone().to(offset.dtype),
    )


def _statistics(x: Tensor, num_groups: int) -> Tensor:
    return torch.empty(x.shape[0], num_groups, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def _meta(x: Tensor, num_groups: int, *, backward: bool, dropout: bool, adaptive: bool):
    """Whether the image is looped over, the grid, and the constants that both kernels of a pass take."""
    n, c, pixels = x.shape[0], int(x.shape[1]), int(x.shape[2]) * int(x.shape[3])
    tiles = norm_tiles(c, pixels, num_groups, itemsize=x.element_size(), backward=backward, dropout=dropout,
                       adaptive=adaptive)  # fmt: skip
    constants = {"C": c, "HW": pixels, "PER_GROUP": c // num_groups, "OWN": tiles.channels, "BLOCK_C": tiles.block_c,
                     "BLOCK_G": tiles.block_g, "BLOCK_HW": tiles.block_hw, "num_warps": tiles.num_warps}  # fmt: skip
    return tiles.looped, (n * -(-c // tiles.channels),), constants


@triton_op("fastdiff_kernels::group_norm_silu", mutates_args={})
def _forward(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, scale: Tensor | None, offset: Tensor | None,
             seed: Tensor | None, num_groups: int, eps: float, silu: bool, dropout_p: float,
             stream: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y like x, and mean and rstd (N, groups) for the backward."""
    if not runs_triton(x):
        return _forward_cpu(x, weight, bias, shift, scale, offset, seed, num_groups, eps, silu, dropout_p, stream)
    y, mean, rstd = torch.empty_like(x), _statistics(x, num_groups), _statistics(x, num_groups)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    switches = {"dropout": seed is not None, "adaptive": scale is not None or offset is not None}
    looped, grid, constants = _meta(x, num_groups, backward=False, **switches)
    args = (x, weight, bias, shift, scale, offset, seed, y, mean, rstd, stream, threshold_of(dropout_p))
    if looped:
        traceable(forward_loop)[grid](*args, EPS=eps, SILU=silu, **constants)
    else:
        traceable(forward_tile)[grid](*args, EPS=eps, SILU=silu, **constants)
    return y, mean, rstd


@triton_op("fastdiff_kernels::group_norm_silu_backward", mutates_args={})
def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, scale: Tensor | None,
              offset: Tensor | None, seed: Tensor | None, mean: Tensor, rstd: Tensor, num_groups: int, silu: bool,
              dropout_p: float, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dweight, dbias, dshift, dscale, doffset; an empty tensor for each of the last three that was not given."""
    if not runs_triton(x):
        return _backward_cpu(dy, x, weight, bias, shift, scale, offset, seed, mean, rstd, num_groups, silu, dropout_p,
                             stream)  # fmt: skip
    grads = [torch.empty_like(v) if v is not None else None for v in (x, weight, bias, shift, scale, offset)]
    dx, dweight, dbias, dshift, dscale, doffset = grads
    if x.numel() == 0:
        return tuple(x.new_empty(0) if g is None else g.zero_() for g in grads)  # ty: ignore[invalid-explicit-return]
    switches = {"dropout": seed is not None, "adaptive": scale is not None or offset is not None}
    looped, grid, constants = _meta(x, num_groups, backward=True, **switches)
    n, c = x.shape[0], int(x.shape[1])
    # Two allocations, not two views of one: Inductor would copy each view back into its base after the kernel.
    part_weight, part_bias = (torch.empty(n, c, device=x.device, dtype=torch.float32) for _ in range(2))
    args = (dy, x, weight, bias, shift, scale, offset, seed, mean, rstd, dx, part_weight, part_bias, dshift, dscale,
            doffset, stream, threshold_of(dropout_p))  # fmt: skip
    if looped:
        traceable(backward_loop)[grid](*args, SILU=silu, **constants)
    else:
        traceable(backward_tile)[grid](*args, SILU=silu, **constants)
    blocks = sum_blocks(c)
    traceable(column_sums)[(-(-c // blocks["BLOCK_C"]),)](part_weight, part_bias, dweight, dbias, n, C=c, **blocks)
    return tuple(x.new_empty(0) if g is None else g for g in grads)  # ty: ignore[invalid-explicit-return]


@_forward.register_fake
def _(x, weight, bias, shift, scale, offset, seed, num_groups, eps, silu, dropout_p, stream):
    return torch.empty_like(x), _statistics(x, num_groups), _statistics(x, num_groups)


@_backward.register_fake
def _(dy, x, weight, bias, shift, scale, offset, seed, mean, rstd, num_groups, silu, dropout_p, stream):
    given = (x, weight, bias, shift, scale, offset)
    return tuple(x.new_empty(0) if v is None else torch.empty_like(v) for v in given)


def _setup_context(ctx, inputs, output):
    x, weight, bias, shift, scale, offset, seed, num_groups, _, silu, dropout_p, stream = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, shift, scale, offset, seed, mean, rstd)
    ctx.plain = (num_groups, silu, dropout_p, stream)


def _autograd(ctx, dy, dmean, drstd):  # mean and rstd never leave this file, so their gradients are zero
    *tensors, mean, rstd = ctx.saved_tensors
    shift, scale, offset = tensors[3:6]
    dy = dy.contiguous(memory_format=torch.channels_last)  # autograd may hand over an expanded or NCHW gradient
    dx, dweight, dbias, dshift, dscale, doffset = _backward(dy, *tensors, mean, rstd, *ctx.plain)
    given = (g if v is not None else None for g, v in ((dshift, shift), (dscale, scale), (doffset, offset)))
    return dx, dweight, dbias, *given, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5, *,
                    shift: Tensor | None = None, scale: Tensor | None = None, offset: Tensor | None = None,
                    activation: Activation = "silu", dropout_p: float = 0.0, seed: Tensor | None = None,
                    stream: int = 0) -> Tensor:  # fmt: skip
    """`dropout(act(group_norm(x + shift) * (1 + scale) + offset))`, differentiable once in every floating argument.

    x           (N, C, H, W) in torch.channels_last, bf16, fp16 or fp32 (float64 too on a CPU); N may be 0
    weight      (C,) and bias (C,), usually fp32 also for a bf16 x; their gradients have their dtype
    num_groups  any divisor of C
    eps         added to the variance
    shift, scale, offset   (N, C), any floating dtype, each optional
    activation  "silu" or "none"
    dropout_p   in [0, 1); needs `seed`, an int64 tensor of one element on x's device, so that a captured graph can
                draw a new mask by writing to it. The mask is a pure function of (seed, stream, position), drawn again
                in the backward and never stored; the CPU path draws the same one
    stream      0 <= stream < 2^31: layers that share one seed take different streams

    Returns y with x's shape, strides and dtype. Statistics and sums are float32 in a fixed order: two runs agree bit
    for bit. Under autocast nothing is cast: y has x's dtype (PyTorch's own group_norm returns float32 on CUDA).

    On CUDA it runs Triton and raises if that fails; on a CPU PyTorch, or Triton's interpreter under TRITON_INTERPRET=1.

    Raises ValueError for shapes, strides or values outside the above (a contiguous NCHW x is refused: converting it
    would hide a copy in every call), TypeError for dtypes.
    """
    _check(x, weight, bias, num_groups, shift, scale, offset, activation, dropout_p, seed, stream)
    rows = [v if v is None else v.contiguous() for v in (shift, scale, offset)]  # halves of a chunk() are strided
    if dropout_p == 0:
        seed = None
    y, _, _ = _forward(x, weight, bias, *rows, seed, num_groups, eps, activation == "silu", dropout_p, stream)
    return y


def _check(x, weight, bias, num_groups, shift, scale, offset, activation, dropout_p, seed, stream) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be (N, C, H, W), got {tuple(x.shape)}")
    n, c = x.shape[:2]
    if x.dtype not in DTYPES and (x.dtype != torch.float64 or runs_triton(x)):
        raise TypeError(f"x must be bfloat16, float16 or float32, got {x.dtype} on {x.device}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"x of shape {tuple(x.shape)} must be channels_last, got strides {x.stride()}; convert the model and "
            "its input once with .to(memory_format=torch.channels_last)"
        )
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"num_groups must divide the {c} channels of x, got {num_groups}")
    for name, v, shape in (("weight", weight, (c,)), ("bias", bias, (c,)), ("shift", shift, (n, c)),
                           ("scale", scale, (n, c)), ("offset", offset, (n, c))):  # fmt: skip
        if v is not None and (v.shape != shape or v.device != x.device):
            raise ValueError(f"{name} must be {tuple(shape)} on {x.device}, got {tuple(v.shape)} on {v.device}")
        if v is not None and not v.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {v.dtype}")
    if activation not in ("silu", "none"):
        raise ValueError(f"activation must be 'silu' or 'none', got {activation!r}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if not 0 <= stream < 2**31:
        raise ValueError(f"stream must be in [0, 2^31), got {stream}")
    if dropout_p > 0 and (seed is None or seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != x.device):
        raise ValueError(f"dropout needs seed, an int64 tensor of one element on {x.device}")


def _case(name: str, n: int, c: int, h: int, w: int, groups: int, *, extras: tuple[str, ...] = (), **plain) -> Case:
    """Standard-normal inputs around a mean of 1; weights are exact in bf16, so that only arithmetic is compared."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16().float()

        inputs: Inputs = {"x": (draw(n, c, h, w) + 1).to(dtype).to(memory_format=torch.channels_last)}
        inputs |= {"weight": 1 + draw(c) / 4, "bias": draw(c) / 4, "num_groups": groups}
        inputs |= {key: (draw(n, c) / 2).to(dtype) for key in extras if key != "seed"}
        if "seed" in extras:
            inputs["seed"] = torch.tensor([0x1234_5678_9ABC + n], dtype=torch.int64)
        return inputs | plain

    return Case(name, make)


def _min_bytes(inputs: Inputs) -> tuple[int, int]:
    """x in and y out; x and dy in and dx out. The vectors are counted too, the partial sums are not."""
    x = inputs["x"]
    vectors = sum(v.nbytes for key, v in inputs.items() if isinstance(v, Tensor) and key not in ("x", "seed"))
    return 2 * x.nbytes + vectors, 3 * x.nbytes + 2 * vectors


SPEC = KernelSpec(
    name="group_norm_silu",
    op=group_norm_silu,
    reference=reference,
    cases=(
        _case("4 channels a group", 2, 128, 8, 8, 32),
        _case("12 channels a group, shift", 2, 96, 16, 16, 8, extras=("shift",)),
        _case(
            "everything at once", 2, 64, 8, 8, 8, extras=("shift", "scale", "offset", "seed"), dropout_p=0.25, stream=3
        ),
        _case("attention's norm", 1, 64, 16, 16, 32, activation="none", eps=1e-6),
        _case("7x5 pixels, odd channels", 3, 33, 7, 5, 11, extras=("scale", "seed"), dropout_p=0.5),
        _case("one pixel, one image", 1, 96, 1, 1, 2, extras=("shift", "offset")),
        _case("one group", 1, 40, 4, 4, 1),
        _case("a group a channel, 33x31", 1, 32, 33, 31, 32, extras=("shift",)),
        _case("looped forward", 1, 128, 20, 24, 1, extras=("shift", "seed"), dropout_p=0.1),
        _case("no images", 0, 32, 4, 4, 8, extras=("shift",)),
    ),
    dtypes=DTYPES,
    min_bytes=_min_bytes,
    differentiable=("x", "weight", "bias", "shift", "scale", "offset"),
)

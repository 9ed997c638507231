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
        return v.to(x.dtype)[..., None, None]

    u = x if shift is None else x + per_image(shift)
    if weight.dim() == 1:
        z = torch.group_norm(u, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    else:
        z = torch.group_norm(u, num_groups, eps=eps) * per_image(weight) + per_image(bias)
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


def _sum(x: Tensor, residual: Tensor | None, skip: Tensor | None, shift: Tensor | None) -> Tensor:
    """cat(x + residual + shift, skip), in the dtype of the statistics."""
    u = _wide(x) if residual is None else _wide(x) + residual
    if shift is not None:
        u = u + shift[:, :, None, None]
    return u if skip is None else torch.cat([u, _wide(skip)], 1)


def _by_group(u: Tensor, num_groups: int) -> Tensor:
    """(N, C, H, W) -> (N, groups, m)."""
    return u.reshape(u.shape[0], num_groups, u.shape[1] // num_groups * u.shape[2] * u.shape[3])


def _affine(weight: Tensor, bias: Tensor, scale: Tensor | None, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """gamma and beta, (1 or N, C)."""
    one_plus = 1.0 if scale is None else 1 + _wide(scale)
    gamma, beta = (_wide(v).reshape(-1, v.shape[-1]) * one_plus for v in (weight, bias))
    return gamma, beta if offset is None else beta + offset


def _channels_last(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v.to(dtype).contiguous(memory_format=torch.channels_last)


def _forward_cpu(x, residual, skip, weight, bias, shift, scale, offset, seed, num_groups, eps, silu, dropout_p,
                 stream, with_sum):  # fmt: skip
    total = _sum(x, residual, skip, shift)
    summed = _channels_last(total, x.dtype).clone() if with_sum else x.new_empty(0)
    u = _by_group(_wide(summed) if with_sum else total, num_groups)
    mean = u.mean(-1, keepdim=True)
    rstd = (u - mean).square().mean(-1, keepdim=True).add(eps).rsqrt()
    gamma, beta = _affine(weight, bias, scale, offset)
    z = ((u - mean) * rstd).reshape(total.shape) * gamma[:, :, None, None] + beta[:, :, None, None]
    y = z * torch.sigmoid(z) if silu else z
    if seed is not None:
        y = y * dropout_factor_torch(seed, y.shape, stream, dropout_p)
    return _channels_last(y, x.dtype), summed, mean.squeeze(-1), rstd.squeeze(-1)


def _backward_cpu(dy, du, x, weight, bias, shift, scale, offset, seed, mean, rstd, num_groups, silu, dropout_p, stream,
                  c_x, summed):  # fmt: skip
    """The formulas of group_norm_math.py, in tensors."""
    gz = _wide(dy)
    if seed is not None:
        gz = gz * dropout_factor_torch(seed, x.shape, stream, dropout_p)
    u = _by_group(_sum(x, None, None, None if summed else shift), num_groups)
    xhat = ((u - mean[..., None]) * rstd[..., None]).reshape(x.shape)
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
    if du is not None:
        dx = dx + du

    def affine_gradient(v: Tensor, like: Tensor) -> Tensor:  # (N, C) -> (C,) or (N, C)
        return (one_plus * v if like.dim() == 2 else (one_plus * v).sum(0)).to(like.dtype)

    plain_weight, plain_bias = _affine(weight, bias, None, None)
    return (
        _channels_last(dx, x.dtype) if c_x == x.shape[1] else _channels_last(dx[:, :c_x], x.dtype).clone(),
        x.new_empty(0) if c_x == x.shape[1] else _channels_last(dx[:, c_x:], x.dtype).clone(),
        affine_gradient(a, weight),
        affine_gradient(b, bias),
        x.new_empty(0) if shift is None else dx[:, :c_x].sum((2, 3)).to(shift.dtype),
        x.new_empty(0) if scale is None else (plain_weight * a + plain_bias * b).to(scale.dtype),
        x.new_empty(0) if offset is None else b.clone().to(offset.dtype),
    )


def _statistics(x: Tensor, num_groups: int) -> Tensor:
    return torch.empty(x.shape[0], num_groups, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def _image(like: Tensor, channels: int) -> Tensor:
    """Uninitialised (N, channels, H, W) in channels_last memory."""
    n, _, height, width = like.shape
    return like.new_empty((n, height, width, channels)).permute(0, 3, 1, 2)


def _meta(x: Tensor, channels: int, num_groups: int, *, backward: bool, dropout: bool, adaptive: bool):
    """Whether the image is looped over, the grid, and the constants that both kernels of a pass take."""
    n, pixels = x.shape[0], int(x.shape[2]) * int(x.shape[3])
    tiles = norm_tiles(channels, pixels, num_groups, itemsize=x.element_size(), backward=backward, dropout=dropout,
                       adaptive=adaptive)  # fmt: skip
    constants = {"C": channels, "HW": pixels, "PER_GROUP": channels // num_groups, "OWN": tiles.channels,
                     "BLOCK_C": tiles.block_c, "BLOCK_G": tiles.block_g, "BLOCK_HW": tiles.block_hw,
                     "num_warps": tiles.num_warps}  # fmt: skip
    return tiles.looped, (n * -(-channels // tiles.channels),), constants


def _row(v: Tensor | None) -> int:
    """Elements from one image's row to the next one's; a vector (C,) is every image's."""
    return v.stride(0) if v is not None and v.dim() == 2 else 0


@triton_op("fastdiff_kernels::group_norm_silu", mutates_args={})
def forward_op(x: Tensor, residual: Tensor | None, skip: Tensor | None, weight: Tensor, bias: Tensor,
               shift: Tensor | None, scale: Tensor | None, offset: Tensor | None, seed: Tensor | None, num_groups: int,
               eps: float, silu: bool, dropout_p: float, stream: int,
               with_sum: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y; u = cat(x + residual + shift, skip), or an empty tensor; mean and rstd (N, groups) for the backward."""
    if not runs_triton(x):
        return _forward_cpu(x, residual, skip, weight, bias, shift, scale, offset, seed, num_groups, eps, silu,
                            dropout_p, stream, with_sum)  # fmt: skip
    c_x = int(x.shape[1])
    c = c_x + (int(skip.shape[1]) if skip is not None else 0)
    y, u = _image(x, c), _image(x, c) if with_sum else None
    mean, rstd = _statistics(x, num_groups), _statistics(x, num_groups)
    if y.numel() == 0:
        return y, x.new_empty(0) if u is None else u, mean.zero_(), rstd.zero_()
    switches = {"dropout": seed is not None, "adaptive": scale is not None or offset is not None}
    looped, grid, constants = _meta(x, c, num_groups, backward=False, **switches)
    args = (x, residual, skip, weight, bias, shift, scale, offset, seed, y, u, mean, rstd, _row(weight), _row(shift),
            stream, threshold_of(dropout_p))  # fmt: skip
    if looped:
        traceable(forward_loop)[grid](*args, EPS=eps, SILU=silu, C_X=c_x, **constants)
    else:
        traceable(forward_tile)[grid](*args, EPS=eps, SILU=silu, C_X=c_x, **constants)
    return y, x.new_empty(0) if u is None else u, mean, rstd


@triton_op("fastdiff_kernels::group_norm_silu_backward", mutates_args={})
def _backward(dy: Tensor, du: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None,
              scale: Tensor | None, offset: Tensor | None, seed: Tensor | None, mean: Tensor, rstd: Tensor,
              num_groups: int, silu: bool, dropout_p: float, stream: int, c_x: int,
              summed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x is u if `summed`, when the shift is in it already; c_x of its channels are those of the forward's x.

    -> dx, dskip, dweight, dbias, dshift, dscale, doffset; an empty tensor for each that was not given.
    """
    if not runs_triton(x):
        return _backward_cpu(dy, du, x, weight, bias, shift, scale, offset, seed, mean, rstd, num_groups, silu,
                             dropout_p, stream, c_x, summed)  # fmt: skip
    n, c = x.shape[0], int(x.shape[1])
    dx, dskip = _image(x, c_x), _image(x, c - c_x) if c_x < c else None
    dweight, dbias = (torch.empty(v.shape, device=x.device, dtype=v.dtype) for v in (weight, bias))
    rows = [None if v is None else torch.empty(v.shape, device=x.device, dtype=v.dtype) for v in (shift, scale, offset)]
    dshift, dscale, doffset = rows
    grads = [dx, dskip, dweight, dbias, *rows]
    if x.numel() == 0:
        return tuple(x.new_empty(0) if g is None else g.zero_() for g in grads)  # ty: ignore[invalid-explicit-return]
    switches = {"dropout": seed is not None, "adaptive": scale is not None or offset is not None}
    looped, grid, constants = _meta(x, c, num_groups, backward=True, **switches)
    part_weight, part_bias = dweight, dbias
    if weight.dim() == 1:
        # Two allocations, not two views of one: Inductor would copy each view back into its base after the kernel.
        part_weight, part_bias = (torch.empty(n, c, device=x.device, dtype=torch.float32) for _ in range(2))
    args = (dy, du, x, weight, bias, None if summed else shift, scale, offset, seed, mean, rstd, dx, dskip, part_weight,
            part_bias, dshift, dscale, doffset, _row(weight), _row(shift), stream, threshold_of(dropout_p))  # fmt: skip
    if looped:
        traceable(backward_loop)[grid](*args, SILU=silu, C_X=c_x, **constants)
    else:
        traceable(backward_tile)[grid](*args, SILU=silu, C_X=c_x, **constants)
    if weight.dim() == 1:
        blocks = sum_blocks(c)
        traceable(column_sums)[(-(-c // blocks["BLOCK_C"]),)](part_weight, part_bias, dweight, dbias, n, C=c, **blocks)
    return tuple(x.new_empty(0) if g is None else g for g in grads)  # ty: ignore[invalid-explicit-return]


@forward_op.register_fake
def _(x, residual, skip, weight, bias, shift, scale, offset, seed, num_groups, eps, silu, dropout_p, stream, with_sum):
    c = x.shape[1] + (0 if skip is None else skip.shape[1])
    u = _image(x, c) if with_sum else x.new_empty(0)
    return _image(x, c), u, _statistics(x, num_groups), _statistics(x, num_groups)


@_backward.register_fake
def _(dy, du, x, weight, bias, shift, scale, offset, seed, mean, rstd, num_groups, silu, dropout_p, stream, c_x,
      summed):  # fmt: skip
    rest = x.shape[1] - c_x
    vectors = (weight, bias, shift, scale, offset)
    return (
        _image(x, c_x), _image(x, rest) if rest else x.new_empty(0),
        *(x.new_empty(0) if v is None else torch.empty(v.shape, device=x.device, dtype=v.dtype) for v in vectors),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, residual, skip, weight, bias, shift, scale, offset, seed, num_groups, _, silu, dropout_p, stream, summed = inputs
    _, u, mean, rstd = output
    ctx.save_for_backward(u if summed else x, weight, bias, shift, scale, offset, seed, mean, rstd)
    ctx.plain = (num_groups, silu, dropout_p, stream, int(x.shape[1]), summed)
    ctx.given = (residual is not None, skip is not None)
    ctx.set_materialize_grads(False)  # where u has no other use it has no gradient, not one of zeros


def _autograd(ctx, dy, du, dmean, drstd):  # mean and rstd never leave this file, so their gradients are zero
    *tensors, mean, rstd = ctx.saved_tensors
    shift, scale, offset = tensors[3:6]
    has_residual, has_skip = ctx.given
    # Autograd may hand over an expanded or NCHW gradient, or none where only the other output was used.
    dy = torch.zeros_like(tensors[0]) if dy is None else dy.contiguous(memory_format=torch.channels_last)
    summed = ctx.plain[-1]
    du = du.contiguous(memory_format=torch.channels_last) if summed and du is not None else None
    dx, dskip, dweight, dbias, *rows = _backward(dy, du, *tensors, mean, rstd, *ctx.plain)
    rows = (g if v is not None else None for g, v in zip(rows, (shift, scale, offset), strict=True))
    images = dx, dx if has_residual else None, dskip if has_skip else None
    return *images, dweight, dbias, *rows, None, None, None, None, None, None, None


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5, *,
                    shift: Tensor | None = None, scale: Tensor | None = None, offset: Tensor | None = None,
                    activation: Activation = "silu", dropout_p: float = 0.0, seed: Tensor | None = None,
                    stream: int = 0) -> Tensor:  # fmt: skip
    """`dropout(act(group_norm(x + shift) * (1 + scale) + offset))`, differentiable once in every floating argument.

    x           (N, C, H, W) in torch.channels_last, bf16, fp16 or fp32 (float64 too on a CPU); N may be 0
    weight      (C,) and bias (C,), usually fp32 also for a bf16 x; their gradients have their dtype. Or both (N, C):
                a row an image; of a parameter that is expanded to all images, autograd then adds up the shares
    num_groups  any divisor of C
    eps         added to the variance
    shift, scale, offset   (N, C), any floating dtype, each optional; shift may be (C,)
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
    check(x, x.shape[1] if x.dim() == 4 else 0, weight, bias, num_groups, shift, scale, offset, activation, dropout_p,
          seed, stream)  # fmt: skip
    vectors = vectors_of(x.shape[0], weight, bias, shift)
    rows = [v if v is None else v.contiguous() for v in (scale, offset)]  # halves of a chunk() are strided
    if dropout_p == 0:
        seed = None
    y, _, _, _ = forward_op(x, None, None, *vectors, *rows, seed, num_groups, eps, activation == "silu", dropout_p,
                            stream, False)  # fmt: skip
    return y


def vectors_of(n: int, weight: Tensor, bias: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same as the operator takes them: weight and bias rows equally far apart, a shift for each image."""
    if weight.dim() == 2 and not (weight.stride() == bias.stride() and weight.stride(1) == 1):
        weight, bias = weight.contiguous(), bias.contiguous()
    if shift is not None:
        shift = shift if shift.dim() == 2 else shift.expand(n, -1)
        shift = shift if shift.stride(1) == 1 else shift.contiguous()
    return weight, bias, shift


def check(x, channels, weight, bias, num_groups, shift, scale, offset, activation, dropout_p, seed, stream) -> None:
    """Raise for what `group_norm_silu` does not take; `channels` are the norm's, of which x may be a part."""
    if x.dim() != 4:
        raise ValueError(f"x must be (N, C, H, W), got {tuple(x.shape)}")
    n, c = x.shape[0], channels
    if x.dtype not in DTYPES and (x.dtype != torch.float64 or runs_triton(x)):
        raise TypeError(f"x must be bfloat16, float16 or float32, got {x.dtype} on {x.device}")
    check_layout("x", x)
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"num_groups must divide the {c} channels of x, got {num_groups}")
    one, each, of_x = (c,), (n, c), x.shape[1]
    for name, v, shapes in (("weight", weight, (one, each)), ("bias", bias, (weight.shape,)),
                            ("shift", shift, ((n, of_x), (of_x,))), ("scale", scale, (each,)),
                            ("offset", offset, (each,))):  # fmt: skip
        if v is not None and (tuple(v.shape) not in map(tuple, shapes) or v.device != x.device):
            wanted = " or ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"{name} must be {wanted} on {x.device}, got {tuple(v.shape)} on {v.device}")
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


def check_layout(name: str, v: Tensor) -> None:
    """Raise unless v is in channels_last memory."""
    if not v.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name} of shape {tuple(v.shape)} must be channels_last, got strides {v.stride()}; convert the model and "
            "its input once with .to(memory_format=torch.channels_last)"
        )


def draw_affine(generator: torch.Generator, shape: tuple[int, ...]) -> Inputs:
    """weight and bias of a test case, exact in bf16."""
    weight, bias = (torch.randn(shape, generator=generator).bfloat16().float() / 4 for _ in range(2))
    return {"weight": 1 + weight, "bias": bias}


def _case(name: str, n: int, c: int, h: int, w: int, groups: int, *, extras: tuple[str, ...] = (), rows: bool = False,
          **plain) -> Case:  # fmt: skip
    """Standard-normal inputs around a mean of 1; weights are exact in bf16, so that only arithmetic is compared."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16().float()

        inputs: Inputs = {"x": (draw(n, c, h, w) + 1).to(dtype).to(memory_format=torch.channels_last)}
        inputs |= draw_affine(generator, (n, c) if rows else (c,)) | {"num_groups": groups}
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
        _case("an affine map for each image", 3, 64, 4, 6, 4, rows=True, extras=("shift", "scale")),
        _case("a group a channel, 33x31", 1, 32, 33, 31, 32, extras=("shift",)),
        _case("looped forward", 1, 128, 20, 24, 1, extras=("shift", "seed"), dropout_p=0.1),
        _case("no images", 0, 32, 4, 4, 8, extras=("shift",)),
    ),
    dtypes=DTYPES,
    min_bytes=_min_bytes,
    differentiable=("x", "weight", "bias", "shift", "scale", "offset"),
)

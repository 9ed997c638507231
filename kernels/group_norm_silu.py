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

from .group_norm_jobs import NORMS, all_jobs
from .group_norm_launch import backward, forward, image, statistics, vector_like
from .language import triton_op
from .launch import runs_triton
from .philox import dropout_factor_torch
from .spec import Case, Inputs, KernelSpec

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
    z = torch.group_norm(u, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        z = z * (1 + per_image(scale))
    if offset is not None:
        z = z + per_image(offset)
    y = torch.nn.functional.silu(z) if activation == "silu" else z
    if seed is not None and dropout_p > 0:
        y = y * dropout_factor_torch(seed, x.shape, stream, dropout_p).to(x.dtype)
    return y


@triton_op("fastdiff_kernels::group_norm_silu", mutates_args={})
def _forward(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, scale: Tensor | None, offset: Tensor | None,
             seed: Tensor | None, num_groups: int, eps: float, silu: bool, dropout_p: float,
             stream: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y like x, and mean and rstd (N, groups) for the backward."""
    y, _, mean, rstd = forward(x, None, None, weight, bias, shift, scale, offset, seed, num_groups, eps, silu,
                               dropout_p, stream, with_sum=False)  # fmt: skip
    return y, mean, rstd


@triton_op("fastdiff_kernels::group_norm_silu_backward", mutates_args={})
def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, scale: Tensor | None,
              offset: Tensor | None, seed: Tensor | None, mean: Tensor, rstd: Tensor, num_groups: int, silu: bool,
              dropout_p: float, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, the images' shares (N, C) of dweight and dbias, dshift, dscale, doffset; an empty tensor for each of the
    last three that was not given."""
    dx, _, *rest = backward(dy, None, None, x, weight, bias, shift, scale, offset, seed, mean, rstd, num_groups, silu,
                            dropout_p, stream, c_x=int(x.shape[1]), summed=False)  # fmt: skip
    return tuple(x.new_empty(0) if g is None else g for g in (dx, *rest))  # ty: ignore[invalid-explicit-return]


@_forward.register_fake
def _(x, weight, bias, shift, scale, offset, seed, num_groups, eps, silu, dropout_p, stream):
    return image(x, x.shape[1]), statistics(x, num_groups), statistics(x, num_groups)


@_backward.register_fake
def _(dy, x, weight, bias, shift, scale, offset, seed, mean, rstd, num_groups, silu, dropout_p, stream):
    c = x.shape[1]
    return image(x, c), statistics(x, c), statistics(x, c), *(vector_like(v, x) for v in (shift, scale, offset))


def _setup_context(ctx, inputs, output):
    x, weight, bias, shift, scale, offset, seed, num_groups, _, silu, dropout_p, stream = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, shift, scale, offset, seed, mean, rstd)
    ctx.plain = (num_groups, silu, dropout_p, stream)


def _autograd(ctx, dy, dmean, drstd):  # mean and rstd never leave this file, so their gradients are zero
    *tensors, mean, rstd = ctx.saved_tensors
    _, weight, bias, shift, scale, offset, _ = tensors
    dy = dy.contiguous(memory_format=torch.channels_last)  # autograd may hand over an expanded or NCHW gradient
    dx, dweight, dbias, dshift, dscale, doffset = _backward(dy, *tensors, mean, rstd, *ctx.plain)
    given = (g if v is not None else None for g, v in ((dshift, shift), (dscale, scale), (doffset, offset)))
    return dx, summed(dweight, weight), summed(dbias, bias), *given, None, None, None, None, None, None


def summed(parts: Tensor, like: Tensor) -> Tensor:
    """The images' shares (N, C) of a parameter's gradient, added up where torch.compile can merge all such sums."""
    return parts.sum(0).to(like.dtype)


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
    shift, scale, offset   (N, C), any floating dtype, each optional; shift may be (C,)
    activation  "silu" or "none"
    dropout_p   in [0, 1); needs `seed`, an int64 tensor of one element on x's device, so that a captured graph can
                draw a new mask by writing to it. The mask is a pure function of (seed, stream, position), drawn again
                in the backward and never stored; the CPU path draws the same one
    stream      0 <= stream < 2^31: layers that share one seed take different streams

    Returns y with x's shape, strides and dtype. Statistics and sums are float32 in a fixed order: two runs agree bit
    for bit. Under autocast nothing is cast: y has x's dtype (PyTorch's own group_norm returns float32 on CUDA).

    Raises ValueError for shapes, strides or values outside the above (a contiguous NCHW x is refused: converting it
    would hide a copy in every call), TypeError for dtypes.
    """
    check(x, x.shape[1] if x.dim() == 4 else 0, weight, bias, num_groups, shift, scale, offset, activation, dropout_p,
          seed, stream)  # fmt: skip
    rows = [v if v is None else v.contiguous() for v in (scale, offset)]  # halves of a chunk() are strided
    if dropout_p == 0:
        seed = None
    y, _, _ = _forward(x, weight.contiguous(), bias.contiguous(), each_images(shift, x.shape[0]), *rows, seed,
                       num_groups, eps, activation == "silu", dropout_p, stream)  # fmt: skip
    return y


def each_images(shift: Tensor | None, n: int) -> Tensor | None:
    """A shift for each image, (N, C), as the operator takes it."""
    if shift is None:
        return None
    if shift.dim() == 1:  # in float32, in which the images' shares of its gradient are then added up
        shift = shift.to(torch.promote_types(shift.dtype, torch.float32)).expand(n, -1)
    return shift if shift.stride(1) == 1 else shift.contiguous()


def check(x, channels, weight, bias, num_groups, shift, scale, offset, activation, dropout_p, seed, stream) -> None:
    """Raise for what `group_norm_silu` does not take; `channels` are the norm's, of which x may be a part."""
    if x.dim() != 4:
        raise ValueError(f"x must be (N, C, H, W), got {tuple(x.shape)}")
    n, c = x.shape[0], channels
    if x.dtype not in DTYPES and (x.dtype != torch.float64 or runs_triton(x)):
        raise TypeError(f"x must be bfloat16, float16 or float32, got {x.dtype} on {x.device}")
    check_layout("x", x)
    what = "x" if c == x.shape[1] else "x and skip"
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"num_groups must divide the {c} channels of {what}, got {num_groups}")
    one, each, of_x = (c,), (n, c), x.shape[1]
    for name, v, shapes in (("weight", weight, (one,)), ("bias", bias, (one,)),
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
    """Raise unless v, (N, C, H, W), is in channels_last memory."""
    _, c, h, w = v.shape
    expected = (h * w * c, 1, w * c, c)
    # The strides themselves too: with a symbolic N, PyTorch 2.11 says no to strides that are right.
    right = all(size == 1 or is_ == want for size, is_, want in zip(v.shape, v.stride(), expected, strict=True))
    if not (v.is_contiguous(memory_format=torch.channels_last) or right):
        raise ValueError(
            f"{name} of shape {tuple(v.shape)} must be channels_last, got strides {v.stride()}; convert the model and "
            "its input once with .to(memory_format=torch.channels_last)"
        )


def draw_affine(generator: torch.Generator, channels: int) -> Inputs:
    """weight and bias of a test case, exact in bf16."""
    weight, bias = (torch.randn(channels, generator=generator).bfloat16().float() / 4 for _ in range(2))
    return {"weight": 1 + weight, "bias": bias}


def _case(name: str, n: int, c: int, h: int, w: int, groups: int, *, extras: tuple[str, ...] = (),
          **plain) -> Case:  # fmt: skip
    """Standard-normal inputs around a mean of 1; weights are exact in bf16, so that only arithmetic is compared."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16().float()

        inputs: Inputs = {"x": (draw(n, c, h, w) + 1).to(dtype).to(memory_format=torch.channels_last)}
        inputs |= draw_affine(generator, c) | {"num_groups": groups}
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
        _case("a shift and a scale for each image", 3, 64, 4, 6, 4, extras=("shift", "scale")),
        _case("a group a channel, 33x31", 1, 32, 33, 31, 32, extras=("shift",)),
        _case("looped forward", 1, 128, 20, 24, 1, extras=("shift", "seed"), dropout_p=0.1),
        _case("no images", 0, 32, 4, 4, 8, extras=("shift",)),
    ),
    dtypes=DTYPES,
    min_bytes=_min_bytes,
    category="norm",
    differentiable=("x", "weight", "bias", "shift", "scale", "offset"),
    jobs=lambda: all_jobs(
        NORMS, [(384, 32, "all", "fp32"), (128, 16, "all", "fp32"), (128, 64, "shift+dropout", "bf16")]
    ),
)

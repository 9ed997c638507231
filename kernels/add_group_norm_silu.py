"""group_norm_silu of a sum that no kernel has formed yet: a residual connection, a bias, a skip concatenation.

    u = cat(x + residual + shift, skip)            y = silu(group_norm(u))

A residual block ends in an addition, and the block after it begins with a norm and with the other branch, which both
read the sum. Here the norm forms it, as fused residual norms of language models do: the terms are read once and u is
written once, for whoever else needs it. The gradient that comes back to u from there is added in the backward kernel
itself, so that no sum of gradients takes a pass of its own either. For n elements of bf16 and a residual:

    forward    add 6 n, norm 4 n  ->  8 n bytes            backward   norm 6 n, add 6 n  ->  8 n

`skip` saves the writing and splitting of a concatenation in the same way. The kernels are group_norm_silu's.

A u that is kept for a skip connection has two other uses. Autograd would add up their gradients before it calls the
backward, in a pass of its own, so the operator gives u out twice: see `_Kept`.
"""

import torch
from torch import Tensor

from .group_norm_jobs import SUMS, all_jobs
from .group_norm_launch import backward, forward, image, statistics, vector_like
from .group_norm_silu import DTYPES, Activation, check, check_layout, draw_affine, each_images, summed
from .group_norm_silu import reference as norm_reference
from .language import triton_op
from .spec import Case, Inputs, KernelSpec


def reference(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5, *,
              residual: Tensor | None = None, skip: Tensor | None = None, shift: Tensor | None = None,
              activation: Activation = "silu") -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same in plain PyTorch, step by step in x's dtype; differentiable, any device, any strides."""
    u = x if shift is None else x + shift.to(x.dtype)[..., None, None]
    u = u if residual is None else u + residual
    u = u if skip is None else torch.cat([u, skip], 1)
    return norm_reference(u, weight, bias, num_groups, eps, activation=activation), u, u.view_as(u)


def _ticket(u: Tensor) -> Tensor:
    return u.new_zeros(()).expand(u.shape)


@triton_op("fastdiff_kernels::add_group_norm_silu", mutates_args={})
def _forward(x: Tensor, residual: Tensor | None, skip: Tensor | None, weight: Tensor, bias: Tensor,
             shift: Tensor | None, num_groups: int, eps: float,
             silu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, u, the ticket of `_Kept`, and mean and rstd (N, groups) for the backward."""
    y, u, mean, rstd = forward(x, residual, skip, weight, bias, shift, None, None, None, num_groups, eps, silu, 0.0, 0,
                               with_sum=True)  # fmt: skip
    assert u is not None
    return y, u, _ticket(u), mean, rstd


@triton_op("fastdiff_kernels::add_group_norm_silu_backward", mutates_args={})
def _backward(dy: Tensor, du: Tensor | None, du2: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor,
              shift: Tensor | None, mean: Tensor, rstd: Tensor, num_groups: int, silu: bool,
              c_x: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dskip, the images' shares (N, C) of dweight and dbias, and dshift, of x = u, whose first c_x channels are
    the forward's x; an empty tensor for skip or shift if it was not given."""
    dx, dskip, dweight, dbias, dshift, *_ = backward(dy, du, du2, x, weight, bias, shift, None, None, None, mean, rstd,
                                                     num_groups, silu, 0.0, 0, c_x, summed=True)  # fmt: skip
    grads = (dx, dskip, dweight, dbias, dshift)
    return tuple(x.new_empty(0) if g is None else g for g in grads)  # ty: ignore[invalid-explicit-return]


@_forward.register_fake
def _(x, residual, skip, weight, bias, shift, num_groups, eps, silu):
    c = x.shape[1] + (0 if skip is None else skip.shape[1])
    u = image(x, c)
    return image(x, c), u, _ticket(u), statistics(x, num_groups), statistics(x, num_groups)


@_backward.register_fake
def _(dy, du, du2, x, weight, bias, shift, mean, rstd, num_groups, silu, c_x):
    c = x.shape[1]
    dskip = image(x, c - c_x) if c_x < c else x.new_empty(0)
    return image(x, c_x), dskip, statistics(x, c), statistics(x, c), vector_like(shift, x)


def _setup_context(ctx, inputs, output):
    x, residual, skip, weight, bias, shift, num_groups, _, silu = inputs
    _, u, _, mean, rstd = output
    ctx.save_for_backward(u, weight, bias, shift, mean, rstd)
    ctx.plain = (num_groups, silu, int(x.shape[1]))
    ctx.given = (residual is not None, skip is not None, shift is not None)
    ctx.set_materialize_grads(False)  # where u has no other use it has no gradient, not one of zeros


def _autograd(ctx, dy, du, du2, dmean, drstd):  # mean and rstd never leave this file, so their gradients are zero
    u, *rest = ctx.saved_tensors
    weight, bias, shift, _, _ = rest
    has_residual, has_skip, has_shift = ctx.given
    # Autograd may hand over an expanded or NCHW gradient, or none where a result was not used.
    dy, du, du2 = (v if v is None else v.contiguous(memory_format=torch.channels_last) for v in (dy, du, du2))
    if dy is None:  # nobody used the norm
        total = du2 if du is None else du if du2 is None else du + du2
        c_x = ctx.plain[-1]
        dx, dskip, dweight, dbias = total[:, :c_x], total[:, c_x:], None, None
        dshift = dx.sum((2, 3), dtype=shift.dtype) if has_shift else None
    else:
        dx, dskip, dweight, dbias, dshift = _backward(dy, du, du2, u, *rest, *ctx.plain)
        dweight, dbias = summed(dweight, weight), summed(dbias, bias)
    images = dx, dx if has_residual else None, dskip if has_skip else None
    return *images, dweight, dbias, dshift if has_shift else None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _Kept(torch.autograd.Function):
    """u once more, whose gradient goes to the operator as that of another of its results: the ticket, a tensor of u's
    shape with one element in memory, which nothing ever reads."""

    @staticmethod
    def forward(ctx, u: Tensor, ticket: Tensor) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:  # ty: ignore[incompatible-method-override]
        return None, gradient


def add_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5, *,
                        residual: Tensor | None = None, skip: Tensor | None = None, shift: Tensor | None = None,
                        activation: Activation = "silu") -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y = act(group_norm(u)), u = cat(x + residual + shift, skip), and u again; differentiable once in all of them.

    x           (N, C1, H, W) in torch.channels_last, bf16, fp16 or fp32 (float64 too on a CPU); N may be 0
    weight      (C,) and bias (C,), C = C1 + C2
    num_groups  any divisor of C; a group may have members in both x and skip
    eps         added to the variance
    residual    (N, C1, H, W) like x
    skip        (N, C2, H, W) in x's dtype, channels_last
    shift       (N, C1) or (C1,), any floating dtype
    activation  "silu" or "none"

    All results are (N, C, H, W) in x's dtype, channels_last. The last two share their memory, so neither may be changed
    in place, and are best used for one thing each: their gradients are added in the kernel. The sum is formed in
    float32 and rounded once; statistics are those of the rounded u. Under autocast nothing is cast.

    Raises ValueError for shapes, strides or values outside the above, TypeError for dtypes.
    """
    for name, v, channels in (("residual", residual, "C1"), ("skip", skip, "C2")):
        if v is None or x.dim() != 4:
            continue
        shape = (x.shape[0], x.shape[1] if name == "residual" else v.shape[1] if v.dim() == 4 else 0, *x.shape[2:])
        if tuple(v.shape) != shape or v.shape[1] == 0 or v.device != x.device:
            wanted = f"({shape[0]}, {channels if name == 'skip' else shape[1]}, {shape[2]}, {shape[3]})"
            raise ValueError(f"{name} must be {wanted} on {x.device}, got {tuple(v.shape)} on {v.device}")
        if v.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype, {x.dtype}, got {v.dtype}")
        check_layout(name, v)
    channels = x.shape[1] + (0 if skip is None else skip.shape[1]) if x.dim() == 4 else 0
    check(x, channels, weight, bias, num_groups, shift, None, None, activation, 0.0, None, 0)
    y, u, ticket, _, _ = _forward(x, residual, skip, weight.contiguous(), bias.contiguous(),
                                  each_images(shift, x.shape[0]), num_groups, eps, activation == "silu")  # fmt: skip
    return y, u, _Kept.apply(u.detach(), ticket)


def _case(name: str, n: int, c: int, h: int, w: int, groups: int, *, c_skip: int = 0, extras: tuple[str, ...] = (),
          **plain) -> Case:  # fmt: skip
    """Standard-normal terms; weights are exact in bf16, so that only arithmetic is compared."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        def image(channels: int) -> Tensor:
            v = torch.randn(n, channels, h, w, generator=generator).bfloat16()
            return v.to(dtype).to(memory_format=torch.channels_last)

        inputs: Inputs = {"x": image(c)} | draw_affine(generator, c + c_skip)
        inputs |= {"num_groups": groups}
        if "residual" in extras:
            inputs["residual"] = image(c)
        if c_skip:
            inputs["skip"] = image(c_skip)
        if "shift" in extras:
            inputs["shift"] = (torch.randn(n, c, generator=generator) / 2).to(dtype)
        return inputs | plain

    return Case(name, make)


def _min_bytes(inputs: Inputs) -> tuple[int, int]:
    """The terms in, y and u out; u, dy, du and du2 in, the gradients of x (the residual's too) and skip out."""
    sizes = {name: v.nbytes for name, v in inputs.items() if isinstance(v, Tensor)}
    total = sizes["x"] + sizes.get("skip", 0)
    vectors = sum(sizes.get(name, 0) for name in ("weight", "bias", "shift"))
    return 3 * total + sizes.get("residual", 0) + vectors, 5 * total + 2 * vectors


SPEC = KernelSpec(
    name="add_group_norm_silu",
    op=add_group_norm_silu,
    reference=reference,
    cases=(
        _case("residual", 2, 128, 8, 8, 32, extras=("residual",)),
        _case("everything at once", 2, 64, 6, 6, 12, c_skip=32, extras=("residual", "shift")),
        _case("12 channels a group, a seam inside one", 2, 64, 16, 16, 8, c_skip=32, extras=("residual",)),
        _case("attention's norm", 1, 64, 16, 16, 32, extras=("residual", "shift"), activation="none", eps=1e-6),
        _case("7x5 pixels, odd channels", 3, 20, 7, 5, 11, c_skip=13, extras=("shift",)),
        _case("one pixel, one image", 1, 64, 1, 1, 2, c_skip=32, extras=("residual",)),
        _case("a bias alone", 2, 48, 5, 5, 4, extras=("shift",)),
        _case("looped forward and backward", 1, 96, 20, 24, 1, c_skip=32, extras=("residual", "shift")),
        _case("no images", 0, 32, 4, 4, 8, c_skip=32, extras=("residual",)),
    ),
    dtypes=DTYPES,
    min_bytes=_min_bytes,
    category="norm",
    jobs=lambda: all_jobs(SUMS, [(384, 32, "add", "fp32"), (128, 16, "add", "fp32")]),
    differentiable=("x", "weight", "bias", "residual", "skip", "shift"),
)

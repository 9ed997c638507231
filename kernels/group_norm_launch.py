"""group_norm_silu and add_group_norm_silu as they run: PyTorch on CPU tensors, else the Triton kernels.

Both operators call these two functions, within which torch.compile sees the kernels themselves.
"""

import torch
from torch import Tensor

from .group_norm_backward import backward_loop, backward_tile
from .group_norm_forward import forward_loop, forward_tile
from .launch import gpu_limits, norm_tiles, runs_triton, traceable
from .philox import dropout_factor_torch, threshold_of


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
    gamma, beta = (_wide(v)[None] * one_plus for v in (weight, bias))
    return gamma, beta if offset is None else beta + offset


def _channels_last(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v.to(dtype).contiguous(memory_format=torch.channels_last)


def _forward_cpu(x, residual, skip, weight, bias, shift, scale, offset, seed, num_groups, eps, silu, dropout_p,
                 stream, with_sum):  # fmt: skip
    total = _sum(x, residual, skip, shift)
    summed = _channels_last(total, x.dtype).clone() if with_sum else None
    u = _by_group(total if summed is None else _wide(summed), num_groups)
    mean = u.mean(-1, keepdim=True)
    rstd = (u - mean).square().mean(-1, keepdim=True).add(eps).rsqrt()
    gamma, beta = _affine(weight, bias, scale, offset)
    z = ((u - mean) * rstd).reshape(total.shape) * gamma[:, :, None, None] + beta[:, :, None, None]
    y = z * torch.sigmoid(z) if silu else z
    if seed is not None:
        y = y * dropout_factor_torch(seed, y.shape, stream, dropout_p)
    return _channels_last(y, x.dtype), summed, mean.squeeze(-1), rstd.squeeze(-1)


def _backward_cpu(dy, du, du2, x, weight, bias, shift, scale, offset, seed, mean, rstd, num_groups, silu, dropout_p,
                  stream, c_x, summed):  # fmt: skip
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
    for v in (du, du2):
        dx = dx if v is None else dx + v

    plain_weight, plain_bias = _affine(weight, bias, None, None)
    return [
        _channels_last(dx, x.dtype) if c_x == x.shape[1] else _channels_last(dx[:, :c_x], x.dtype).clone(),
        None if c_x == x.shape[1] else _channels_last(dx[:, c_x:], x.dtype).clone(),
        one_plus * a,
        one_plus * b,
        None if shift is None else dx[:, :c_x].sum((2, 3)).to(shift.dtype),
        None if scale is None else (plain_weight * a + plain_bias * b).to(scale.dtype),
        None if offset is None else b.clone().to(offset.dtype),
    ]


def statistics(x: Tensor, columns: int) -> Tensor:
    """Uninitialised (N, columns): a mean or rstd by groups, or the images' shares of a gradient by channels."""
    return torch.empty(x.shape[0], columns, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def image(like: Tensor, channels: int) -> Tensor:
    """Uninitialised (N, channels, H, W) in channels_last memory."""
    n, _, height, width = like.shape
    return like.new_empty((n, height, width, channels)).permute(0, 3, 1, 2)


def vector_like(v: Tensor | None, x: Tensor) -> Tensor:
    """Uninitialised, for the gradient of v; empty where there is no v."""
    return x.new_empty(0) if v is None else torch.empty(v.shape, device=x.device, dtype=v.dtype)


def _meta(x: Tensor, channels: int, num_groups: int, *, backward: bool, dropout: bool, adaptive: bool, images: int):
    """Whether the image is looped over, the grid, and the constants that the kernel takes.

    It reads so many images; where shared memory is too small to load all of them ahead, none is.
    """
    n, pixels = x.shape[0], int(x.shape[2]) * int(x.shape[3])
    tiles = norm_tiles(channels, pixels, num_groups, itemsize=x.element_size(), backward=backward, dropout=dropout,
                       adaptive=adaptive)  # fmt: skip
    count, ahead = n * -(-channels // tiles.channels), False
    if tiles.ahead:
        multiprocessors, shared = gpu_limits(x.device)
        ahead = tiles.shared_bytes(images, x.element_size()) <= shared
        if ahead and not tiles.looped:
            count = torch.sym_min(count, tiles.ahead * multiprocessors)
    constants = {"C": channels, "HW": pixels, "PER_GROUP": channels // num_groups, "OWN": tiles.channels,
                     "BLOCK_C": tiles.block_c, "BLOCK_G": tiles.block_g, "BLOCK_HW": tiles.block_hw, "AHEAD": ahead,
                     "num_warps": tiles.num_warps}  # fmt: skip
    return tiles.looped, (count,), constants if tiles.looped else constants | {"N": n}


def _row(shift: Tensor | None) -> int:
    """Elements from one image's row to the next one's."""
    return 0 if shift is None else shift.stride(0)


def forward(x: Tensor, residual: Tensor | None, skip: Tensor | None, weight: Tensor, bias: Tensor,
            shift: Tensor | None, scale: Tensor | None, offset: Tensor | None, seed: Tensor | None, num_groups: int,
            eps: float, silu: bool, dropout_p: float, stream: int,
            with_sum: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """-> y; u = cat(x + residual + shift, skip), with `with_sum`; mean and rstd (N, groups) for the backward."""
    if not runs_triton(x):
        return _forward_cpu(x, residual, skip, weight, bias, shift, scale, offset, seed, num_groups, eps, silu,
                            dropout_p, stream, with_sum)  # fmt: skip
    c_x = int(x.shape[1])
    c = c_x + (int(skip.shape[1]) if skip is not None else 0)
    y, u = image(x, c), image(x, c) if with_sum else None
    mean, rstd = statistics(x, num_groups), statistics(x, num_groups)
    if y.numel() == 0:
        return y, u, mean.zero_(), rstd.zero_()
    switches = {"dropout": seed is not None, "adaptive": scale is not None or offset is not None}
    images = sum(v is not None for v in (x, residual, skip))
    looped, grid, constants = _meta(x, c, num_groups, backward=False, images=images, **switches)
    args = (x, residual, skip, weight, bias, shift, scale, offset, seed, y, u, mean, rstd, _row(shift), stream,
            threshold_of(dropout_p))  # fmt: skip
    kernel = traceable(forward_loop if looped else forward_tile)
    kernel[grid](*args, EPS=eps, SILU=silu, C_X=c_x, **constants)
    return y, u, mean, rstd


def backward(dy: Tensor, du: Tensor | None, du2: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor,
             shift: Tensor | None, scale: Tensor | None, offset: Tensor | None, seed: Tensor | None, mean: Tensor,
             rstd: Tensor, num_groups: int, silu: bool, dropout_p: float, stream: int, c_x: int,
             summed: bool) -> list[Tensor | None]:  # fmt: skip
    """-> dx, dskip, the images' shares (N, C) of dweight and dbias, dshift, dscale, doffset; None for each that was not
    given.

    x is u if `summed`, when the shift is in it already; c_x of its channels are those of the forward's x. du and du2
    are added to its gradient.
    """
    if not runs_triton(x):
        return _backward_cpu(dy, du, du2, x, weight, bias, shift, scale, offset, seed, mean, rstd, num_groups, silu,
                             dropout_p, stream, c_x, summed)  # fmt: skip
    c = int(x.shape[1])
    dx, dskip = image(x, c_x), image(x, c - c_x) if c_x < c else None
    # Not two views of one: Inductor would copy each back after the kernel.
    dweight, dbias = statistics(x, c), statistics(x, c)
    dshift, dscale, doffset = (None if v is None else vector_like(v, x) for v in (shift, scale, offset))
    grads = [dx, dskip, dweight, dbias, dshift, dscale, doffset]
    if x.numel() == 0:
        return [g if g is None else g.zero_() for g in grads]
    switches = {"dropout": seed is not None, "adaptive": scale is not None or offset is not None}
    images = sum(v is not None for v in (dy, du, du2, x))
    looped, grid, constants = _meta(x, c, num_groups, backward=True, images=images, **switches)
    args = (dy, du, du2, x, weight, bias, None if summed else shift, scale, offset, seed, mean, rstd, dx, dskip,
            dweight, dbias, dshift, dscale, doffset, _row(shift), stream, threshold_of(dropout_p))  # fmt: skip
    traceable(backward_loop if looped else backward_tile)[grid](*args, SILU=silu, C_X=c_x, **constants)
    return grads

# ty: ignore[invalid-argument-type]  Triton's stubs do not describe how one kernel calls another
"""group_norm_silu, backward: the formulas and names are those of kernels/group_norm_math.py."""

from .group_norm_math import (
    affine,
    at,
    dropped,
    grad_z,
    group_sum,
    load,
    per_image,
    rounds,
    store_parts,
    to_channels,
    zero_outside,
)
from .language import tl, triton


@triton.jit
def _store_sums(a, b, weight_ptr, bias_ptr, scale_ptr, part_weight_ptr, part_bias_ptr, dscale_ptr, doffset_ptr,
                n, channel, ok, C: tl.constexpr):  # fmt: skip
    """Write what follows from A and B [BC]: the images' shares of dweight and dbias, and dscale and doffset."""
    here = n.to(tl.int64) * C + channel
    one_plus = 1.0 + per_image(scale_ptr, n, C, channel, ok)
    tl.store(part_weight_ptr + here, a * one_plus, mask=ok)
    tl.store(part_bias_ptr + here, b * one_plus, mask=ok)
    if dscale_ptr is not None:
        weight = per_image(weight_ptr, n, 0, channel, ok)
        bias = per_image(bias_ptr, n, 0, channel, ok)
        tl.store(dscale_ptr + here, (weight * a + bias * b).to(dscale_ptr.dtype.element_ty), mask=ok)
    if doffset_ptr is not None:
        tl.store(doffset_ptr + here, b.to(doffset_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _store_dshift(dshift_ptr, dshift, n, channel, ok, C_X: tl.constexpr):
    here = n.to(tl.int64) * C_X + channel
    tl.store(dshift_ptr + here, dshift.to(dshift_ptr.dtype.element_ty), mask=ok & (channel < C_X))


@triton.jit(do_not_specialize=["N", "stream_id", "threshold"])
def backward_tile(
    dy_ptr,  # (N, HW, C) like x
    du_ptr,  # (N, HW, C) like x: the gradient of what was normalised, from its other uses; or None
    du2_ptr,  # (N, HW, C) like x: a second part of it, or None
    x_ptr,  # (N, HW, C) bf16, fp16 or fp32: what was normalised, but for the shift
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    shift_ptr,  # (N, C), rows shift_row apart; or None
    scale_ptr,  # (N, C) or None
    offset_ptr,  # (N, C) or None
    seed_ptr,  # (1,) int64 or None
    mean_ptr,  # (N, C / PER_GROUP) fp32
    rstd_ptr,  # (N, C / PER_GROUP) fp32
    dx_ptr,  # (N, HW, C_X) like x
    dskip_ptr,  # (N, HW, C - C_X) like x, or None
    part_weight_ptr,  # (N, C) fp32: the images' shares
    part_bias_ptr,  # (N, C) fp32
    dshift_ptr,  # (N, C_X) like shift, or None
    dscale_ptr,  # (N, C) like scale, or None
    doffset_ptr,  # (N, C) like offset, or None
    shift_row,
    stream_id,
    threshold,
    N,
    SILU: tl.constexpr,
    C: tl.constexpr,
    C_X: tl.constexpr,
    HW: tl.constexpr,
    PER_GROUP: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Small images: x and dy stay in registers, 6 bytes an element in bf16, and 2 for each of du and du2.

    AHEAD as in forward_tile.
    """
    blocks: tl.constexpr = (C + OWN - 1) // OWN
    local = tl.arange(0, BLOCK_C)  # [BC]
    pixel = tl.arange(0, BLOCK_HW)  # [BHW]
    for i in tl.range(0, rounds(N * blocks, AHEAD), num_stages=3 if AHEAD else 1):
        tile = tl.program_id(0) + i * tl.num_programs(0)
        n, first = tile // blocks, tile % blocks * OWN
        channel = first + local  # [BC]
        ok = (local < OWN) & (channel < C)  # [BC]
        ok2 = (pixel < HW)[:, None] & ok[None, :]  # [BHW, BC]
        here = at(n, pixel, channel, HW, C)  # [BHW, BC]
        at_group = n * (C // PER_GROUP) + channel // PER_GROUP  # [BC]: mean and rstd come back spread to channels
        mean = tl.load(mean_ptr + at_group, mask=ok, other=0.0)
        rstd = tl.load(rstd_ptr + at_group, mask=ok, other=0.0)
        gamma, beta = affine(weight_ptr, bias_ptr, scale_ptr, offset_ptr, n, channel, ok, C)
        shift = per_image(shift_ptr, n, shift_row, channel, ok)
        centre = (shift - mean) * rstd  # xhat = x * rstd + centre: one instruction

        whole: tl.constexpr = OWN == BLOCK_C and C % OWN == 0 and BLOCK_HW == HW
        x, dy = load(x_ptr + here, ok2, whole, ""), load(dy_ptr + here, ok2, whole, "")
        dy = dropped(dy.to(tl.float32), seed_ptr, n, pixel, first, stream_id, threshold, C, BLOCK_C)
        xhat = x.to(tl.float32) * rstd[None, :] + centre[None, :]
        gz = grad_z(xhat, dy, gamma, beta, SILU)  # 0 in the padding, where dy is 0
        a, b = tl.sum(gz * xhat, 0), tl.sum(gz, 0)  # [BC]
        _store_sums(a, b, weight_ptr, bias_ptr, scale_ptr, part_weight_ptr, part_bias_ptr, dscale_ptr, doffset_ptr,
                    n, channel, ok, C)  # fmt: skip

        m: tl.constexpr = HW * PER_GROUP
        mean_a = to_channels(group_sum(gamma * a, local, PER_GROUP, BLOCK_G) / m, local, PER_GROUP, BLOCK_G)  # [BC]
        mean_b = to_channels(group_sum(gamma * b, local, PER_GROUP, BLOCK_G) / m, local, PER_GROUP, BLOCK_G)
        dx = gz * (gamma * rstd)[None, :] - (xhat * (mean_a * rstd)[None, :] + (mean_b * rstd)[None, :])
        # Read only now: held from the start, they would halve the programs of a multiprocessor at some shapes.
        if du_ptr is not None:
            dx += load(du_ptr + here, ok2, whole, "").to(tl.float32)
        if du2_ptr is not None:
            dx += load(du2_ptr + here, ok2, whole, "").to(tl.float32)
        store_parts(dx_ptr, dskip_ptr, dx, n, pixel, first, local, ok2, HW, C, C_X, OWN, whole)
        if dshift_ptr is not None:
            _store_dshift(dshift_ptr, tl.sum(zero_outside(dx, ok2, whole), 0), n, channel, ok, C_X)


@triton.jit(do_not_specialize=["stream_id", "threshold"])
def backward_loop(dy_ptr, du_ptr, du2_ptr, x_ptr, weight_ptr, bias_ptr, shift_ptr, scale_ptr, offset_ptr, seed_ptr,
                  mean_ptr, rstd_ptr, dx_ptr, dskip_ptr, part_weight_ptr, part_bias_ptr, dshift_ptr, dscale_ptr,
                  doffset_ptr, shift_row, stream_id, threshold, SILU: tl.constexpr, C: tl.constexpr, C_X: tl.constexpr,
                  HW: tl.constexpr, PER_GROUP: tl.constexpr, OWN: tl.constexpr, BLOCK_C: tl.constexpr,
                  BLOCK_G: tl.constexpr, BLOCK_HW: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """Large images in two sweeps over chunks of pixels: first A and B, then dx, re-reading x and dy from L2.

    Arguments as of backward_tile, AHEAD as in forward_loop.
    """
    blocks: tl.constexpr = (C + OWN - 1) // OWN
    n, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * OWN
    local = tl.arange(0, BLOCK_C)  # [BC]
    channel = first + local  # [BC]
    ok = (local < OWN) & (channel < C)  # [BC]
    row = tl.arange(0, BLOCK_HW)  # [BHW]
    whole: tl.constexpr = OWN == BLOCK_C and C % OWN == 0 and HW % BLOCK_HW == 0
    at_group = n * (C // PER_GROUP) + channel // PER_GROUP  # [BC]: mean and rstd come back already spread to channels
    mean = tl.load(mean_ptr + at_group, mask=ok, other=0.0)
    rstd = tl.load(rstd_ptr + at_group, mask=ok, other=0.0)
    gamma, beta = affine(weight_ptr, bias_ptr, scale_ptr, offset_ptr, n, channel, ok, C)
    # A thread holds 8 channels of every per-channel number here, so the fewer the better: xhat = x * rstd + centre.
    centre = (per_image(shift_ptr, n, shift_row, channel, ok) - mean) * rstd

    # Sums stay one per (row, channel) until the end of the sweep: no exchange between threads inside the loop.
    sum_a = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    sum_b = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    for i in tl.range(0, HW, BLOCK_HW, num_stages=3 if AHEAD else 1):
        pixel = i + row
        ok2 = (pixel < HW)[:, None] & ok[None, :]
        here = at(n, pixel, channel, HW, C)
        x = load(x_ptr + here, ok2, whole, "evict_last").to(tl.float32)
        dy = load(dy_ptr + here, ok2, whole, "evict_last").to(tl.float32)
        dy = dropped(dy, seed_ptr, n, pixel, first, stream_id, threshold, C, BLOCK_C)
        xhat = x * rstd[None, :] + centre[None, :]
        gz = grad_z(xhat, dy, gamma, beta, SILU)
        sum_a += gz * xhat
        sum_b += gz
    a, b = tl.sum(sum_a, 0), tl.sum(sum_b, 0)  # [BC]
    _store_sums(a, b, weight_ptr, bias_ptr, scale_ptr, part_weight_ptr, part_bias_ptr, dscale_ptr, doffset_ptr,
                n, channel, ok, C)  # fmt: skip

    m: tl.constexpr = HW * PER_GROUP
    mean_a = to_channels(group_sum(gamma * a, local, PER_GROUP, BLOCK_G) / m, local, PER_GROUP, BLOCK_G)  # [BC]
    mean_b = to_channels(group_sum(gamma * b, local, PER_GROUP, BLOCK_G) / m, local, PER_GROUP, BLOCK_G)
    sum_dx = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    for i in tl.range(0, HW, BLOCK_HW, num_stages=3 if AHEAD else 1):
        pixel = i + row
        ok2 = (pixel < HW)[:, None] & ok[None, :]
        here = at(n, pixel, channel, HW, C)
        x = load(x_ptr + here, ok2, whole, "evict_first").to(tl.float32)
        dy = load(dy_ptr + here, ok2, whole, "evict_first").to(tl.float32)
        dy = dropped(dy, seed_ptr, n, pixel, first, stream_id, threshold, C, BLOCK_C)
        xhat = x * rstd[None, :] + centre[None, :]
        gz = grad_z(xhat, dy, gamma, beta, SILU)
        dx = gz * (gamma * rstd)[None, :] - (xhat * (mean_a * rstd)[None, :] + (mean_b * rstd)[None, :])
        if du_ptr is not None:
            dx += load(du_ptr + here, ok2, whole, "evict_first").to(tl.float32)
        if du2_ptr is not None:
            dx += load(du2_ptr + here, ok2, whole, "evict_first").to(tl.float32)
        store_parts(dx_ptr, dskip_ptr, dx, n, pixel, first, local, ok2, HW, C, C_X, OWN, whole)
        if dshift_ptr is not None:
            sum_dx += zero_outside(dx, ok2, whole)
    if dshift_ptr is not None:
        _store_dshift(dshift_ptr, tl.sum(sum_dx, 0), n, channel, ok, C_X)

# ty: ignore[invalid-argument-type]  Triton's stubs do not describe how one kernel calls another
"""group_norm_silu, forward: the formulas and names are those of kernels/group_norm_math.py."""

from .group_norm_math import (
    activate,
    affine,
    at,
    dropped,
    load,
    load_sum,
    per_image,
    rounds,
    store,
    tile_group_sum,
    to_channels,
    zero_outside,
)
from .language import tl, triton


@triton.jit(do_not_specialize=["N", "stream_id", "threshold"])
def forward_tile(
    x_ptr,  # (N, HW, C_X) bf16, fp16 or fp32
    residual_ptr,  # (N, HW, C_X) like x, or None
    skip_ptr,  # (N, HW, C - C_X) like x, or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    shift_ptr,  # (N, C_X), rows shift_row apart, or None
    scale_ptr,  # (N, C) or None
    offset_ptr,  # (N, C) or None
    seed_ptr,  # (1,) int64 or None: no dropout
    y_ptr,  # (N, HW, C) like x
    u_ptr,  # (N, HW, C) like x: what was normalised; or None
    mean_ptr,  # (N, C / PER_GROUP) fp32
    rstd_ptr,  # (N, C / PER_GROUP) fp32
    shift_row,
    stream_id,
    threshold,
    N,
    EPS: tl.constexpr,
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
    """The whole [HW, OWN] tile stays in registers: x is read once and y written once (4 bytes an element in bf16).

    A program computes while nothing of its own is on the way from memory. Many small programs on a multiprocessor fill
    each other's gaps; where a few large ones do not, there is AHEAD: programs stay, going from tile to tile, and the
    compiler copies tiles to shared memory ahead. It takes three stages, as with two a copy is waited for right after
    its start: one tile is computed, the next is on its way, and the one after that is started at the end of the round.
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
        whole: tl.constexpr = OWN == BLOCK_C and C % OWN == 0 and BLOCK_HW == HW
        shift = per_image(shift_ptr, n, shift_row, channel, ok & (channel < C_X))  # [BC]
        u = load_sum(x_ptr, residual_ptr, skip_ptr, n, pixel, first, local, shift, ok2, HW, C, C_X, OWN, whole, "",
                     AHEAD)  # fmt: skip
        if u_ptr is not None:
            u = u.to(u_ptr.dtype.element_ty).to(tl.float32)  # the backward will see it rounded
            store(u_ptr + here, u, ok2, whole)

        # Mean first, then the variance of what is centred: E[u^2] - E[u]^2 cancels when the mean is large.
        m: tl.constexpr = HW * PER_GROUP
        u = zero_outside(u, ok2, whole)
        mean = tile_group_sum(u, local, PER_GROUP, BLOCK_G) / m  # [BG]
        mean_c = to_channels(mean, local, PER_GROUP, BLOCK_G)  # [BC]
        centred = zero_outside(u - mean_c[None, :], ok2, whole)
        variance = tile_group_sum(centred * centred, local, PER_GROUP, BLOCK_G) / m
        rstd = 1.0 / tl.sqrt_rn(variance + EPS)  # [BG]

        gamma, beta = affine(weight_ptr, bias_ptr, scale_ptr, offset_ptr, n, channel, ok, C)
        y = activate(centred, gamma * to_channels(rstd, local, PER_GROUP, BLOCK_G), beta, SILU)
        y = dropped(y, seed_ptr, n, pixel, first, stream_id, threshold, C, BLOCK_C)
        store(y_ptr + here, y, ok2, whole)

        group = tl.arange(0, BLOCK_G)
        in_block = (group < OWN // PER_GROUP) & (first // PER_GROUP + group < C // PER_GROUP)
        at_group = n * (C // PER_GROUP) + first // PER_GROUP + group
        tl.store(mean_ptr + at_group, mean, mask=in_block)
        tl.store(rstd_ptr + at_group, rstd, mask=in_block)


@triton.jit(do_not_specialize=["stream_id", "threshold"])
def forward_loop(x_ptr, residual_ptr, skip_ptr, weight_ptr, bias_ptr, shift_ptr, scale_ptr, offset_ptr, seed_ptr, y_ptr,
                 u_ptr, mean_ptr, rstd_ptr, shift_row, stream_id, threshold, EPS: tl.constexpr, SILU: tl.constexpr,
                 C: tl.constexpr, C_X: tl.constexpr, HW: tl.constexpr, PER_GROUP: tl.constexpr, OWN: tl.constexpr,
                 BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_HW: tl.constexpr,
                 AHEAD: tl.constexpr):  # fmt: skip
    """Images too large for registers: three sweeps (mean, variance, result), of which two read x, or u, from L2.

    Arguments as of forward_tile. AHEAD: chunks are copied ahead, as tiles are there; the programs are as many as
    without.
    """
    blocks: tl.constexpr = (C + OWN - 1) // OWN
    n, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * OWN
    local = tl.arange(0, BLOCK_C)  # [BC]
    channel = first + local  # [BC]
    ok = (local < OWN) & (channel < C)  # [BC]
    row = tl.arange(0, BLOCK_HW)  # [BHW]
    whole: tl.constexpr = OWN == BLOCK_C and C % OWN == 0 and HW % BLOCK_HW == 0
    shift = per_image(shift_ptr, n, shift_row, channel, ok & (channel < C_X))  # [BC]
    m: tl.constexpr = HW * PER_GROUP

    total = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    for i in tl.range(0, HW, BLOCK_HW, num_stages=3 if AHEAD else 1):
        pixel = i + row
        ok2 = (pixel < HW)[:, None] & ok[None, :]
        u = load_sum(x_ptr, residual_ptr, skip_ptr, n, pixel, first, local, shift, ok2, HW, C, C_X, OWN, whole,
                     "evict_last", AHEAD)  # fmt: skip
        if u_ptr is not None:
            u = u.to(u_ptr.dtype.element_ty).to(tl.float32)
            store(u_ptr + at(n, pixel, channel, HW, C), u, ok2, whole)
        total += zero_outside(u, ok2, whole)
    if u_ptr is not None:  # the next sweeps read what this one has added up; other threads may have written it
        tl.debug_barrier()
        x_ptr, shift = u_ptr, tl.zeros_like(shift)
    mean = tile_group_sum(total, local, PER_GROUP, BLOCK_G) / m  # [BG]
    mean_c = to_channels(mean, local, PER_GROUP, BLOCK_G)  # [BC]

    total = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    for i in tl.range(0, HW, BLOCK_HW, num_stages=3 if AHEAD else 1):
        pixel = i + row
        ok2 = (pixel < HW)[:, None] & ok[None, :]
        x = load(x_ptr + at(n, pixel, channel, HW, C), ok2, whole, "evict_last").to(tl.float32)
        centred = zero_outside((x + shift[None, :]) - mean_c[None, :], ok2, whole)
        total += centred * centred
    variance = tile_group_sum(total, local, PER_GROUP, BLOCK_G) / m
    rstd = 1.0 / tl.sqrt_rn(variance + EPS)  # [BG]

    gamma, beta = affine(weight_ptr, bias_ptr, scale_ptr, offset_ptr, n, channel, ok, C)
    gamma *= to_channels(rstd, local, PER_GROUP, BLOCK_G)  # [BC]: y needs gamma * rstd only
    for i in tl.range(0, HW, BLOCK_HW, num_stages=3 if AHEAD else 1):
        pixel = i + row
        ok2 = (pixel < HW)[:, None] & ok[None, :]
        here = at(n, pixel, channel, HW, C)
        x = load(x_ptr + here, ok2, whole, "evict_first").to(tl.float32)
        y = activate((x + shift[None, :]) - mean_c[None, :], gamma, beta, SILU)
        y = dropped(y, seed_ptr, n, pixel, first, stream_id, threshold, C, BLOCK_C)
        store(y_ptr + here, y, ok2, whole)

    group = tl.arange(0, BLOCK_G)
    in_block = (group < OWN // PER_GROUP) & (first // PER_GROUP + group < C // PER_GROUP)
    at_group = n * (C // PER_GROUP) + first // PER_GROUP + group
    tl.store(mean_ptr + at_group, mean, mask=in_block)
    tl.store(rstd_ptr + at_group, rstd, mask=in_block)

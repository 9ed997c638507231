# ty: ignore[invalid-argument-type]  Triton's stubs do not describe how one kernel calls another
"""The mathematics that group_norm_silu's forward and backward kernels share, one tile at a time.

For image n, channel c of group g, pixel p (HW of them), with m = HW * channels per group:

    u     = cat(x + residual + shift[n, c], skip)                what is normalised; each but x is optional
    mean  = sum_g u / m          rstd = 1 / sqrt(sum_g (u - mean)^2 / m + eps)
    xhat  = (u - mean) * rstd
    gamma = weight * (1 + scale[n, c])      beta = bias * (1 + scale[n, c]) + offset[n, c]
    z     = gamma * xhat + beta
    y     = z * sigmoid(z) * drop                                drop = 0 or 1 / (1 - p), from Philox

Backward, with gz = dL/dz = dy * drop * s * (1 + z * (1 - s)), s = sigmoid(z):

    B[n, c] = sum_p gz           A[n, c] = sum_p gz * xhat       all other sums come from these two
    dx      = (gamma * gz - sum_g(gamma * B) / m - xhat * sum_g(gamma * A) / m) * rstd
    dx     += du + du2, the gradients of u from its other uses, where it left the kernel; the channels are those of x,
              whose gradient is residual's too, and those of skip
    dshift  = sum_p dx           doffset = B                     dscale = weight * A + bias * B
    dweight = sum_n (1 + scale) * A                              dbias = sum_n (1 + scale) * B      (see _autograd)

Memory: an image is the row-major matrix [HW, C], so a tile of whole rows of BLOCK_C neighbouring channels is read in
16-byte pieces. Such a tile, one image and one block of whole groups, is one program's, hence nothing is exchanged
between programs and every sum has a fixed order: the results are the same bits on every run. The blocks of one image
are neighbours in the grid, so that a 128-byte cache line shared by two blocks is fetched once. All arithmetic is
float32.

Arithmetic is not free here: while an H200 moves an element at 4.3 TB/s, its multiprocessors issue at most 31
instructions for it in the forward and 47 in the backward (1.98 GHz). Hence the short sigmoid, and no masks and selects
where every tile is whole.

Shapes in the comments: BHW = BLOCK_HW pixels, BC = BLOCK_C channels, BG = BLOCK_G groups; the first OWN of the BC
channels belong to the program, the rest pad to a power of two. Plain floats (eps) are constexpr: compiled code and
eager code would otherwise pass them in different precisions (float64 and float32).
"""

from .language import INTERPRETED, tl, triton
from .philox import dropout_factor

COMPILED: tl.constexpr = tl.constexpr(not INTERPRETED)  # the interpreter knows no PTX


@triton.jit
def load(ptr, ok, WHOLE: tl.constexpr, EVICT: tl.constexpr):
    """A tile; zeros where not `ok`, which is ignored if the tile is WHOLE.

    EVICT tells L2 what to keep: "evict_last" what another sweep reads again, "evict_first" what nobody does; "" leaves
    it to L2.
    """
    if WHOLE:
        return tl.load(ptr, eviction_policy=EVICT)
    else:
        return tl.load(ptr, mask=ok, other=0.0, eviction_policy=EVICT)


@triton.jit
def rounds(tiles, AHEAD: tl.constexpr):
    """Tiles that this program goes through: one, or where programs load ahead every num_programs-th."""
    if AHEAD:
        return tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))
    else:
        return 1


@triton.jit
def tile_group_sum(v, local, PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """v [BHW, BC] -> sums per group [BG]. Groups first: threads then exchange one number a group, not a channel."""
    if v.shape[1] == BLOCK_G * PER_GROUP:
        return tl.sum(tl.sum(tl.reshape(v, [v.shape[0], BLOCK_G, PER_GROUP]), 2), 0)
    else:
        return group_sum(tl.sum(v, 0), local, PER_GROUP, BLOCK_G)


@triton.jit
def store(ptr, v, ok, WHOLE: tl.constexpr):
    """Write a tile, in the dtype of the pointer."""
    if WHOLE:
        tl.store(ptr, v.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr, v.to(ptr.dtype.element_ty), mask=ok)


@triton.jit
def zero_outside(v, ok, WHOLE: tl.constexpr):
    """v, and 0 in the padding."""
    if WHOLE:
        return v
    else:
        return tl.where(ok, v, 0.0)


@triton.jit
def group_sum(v, local, PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """Per-channel numbers v [BC] -> their sums per group [BG]; local [BC] counts channels from the block's first."""
    if v.shape[0] == BLOCK_G * PER_GROUP:
        return tl.sum(tl.reshape(v, [BLOCK_G, PER_GROUP]), 1)
    else:
        group = tl.arange(0, BLOCK_G)
        member = (local // PER_GROUP)[None, :] == group[:, None]  # [BG, BC] one-hot: any group size
        return tl.sum(tl.where(member, v[None, :], 0.0), 1)  # where, not a product: a NaN stays in its own group


@triton.jit
def to_channels(v, local, PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """Per-group numbers v [BG] -> the same number at each of the group's channels [BC]."""
    if local.shape[0] == BLOCK_G * PER_GROUP:
        return tl.reshape(tl.broadcast_to(v[:, None], [BLOCK_G, PER_GROUP]), [BLOCK_G * PER_GROUP])
    else:
        group = tl.arange(0, BLOCK_G)
        member = (local // PER_GROUP)[None, :] == group[:, None]  # [BG, BC]
        return tl.sum(tl.where(member, v[:, None], 0.0), 0)


@triton.jit
def per_image(ptr, n, row, channel, ok):
    """Row n of an optional (N, C) tensor as float32 [BC], zeros where the tensor was not given; `row` elements lie
    between two rows, 0 where all images share one."""
    if ptr is None:
        return tl.zeros(channel.shape, tl.float32)
    else:
        return tl.load(ptr + n.to(tl.int64) * row + channel, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def affine(weight_ptr, bias_ptr, scale_ptr, offset_ptr, n, channel, ok, C: tl.constexpr):
    """gamma and beta [BC]: the learned affine map with the image's own scale and offset (AdaGN) folded in."""
    one_plus = 1.0 + per_image(scale_ptr, n, C, channel, ok)
    gamma = per_image(weight_ptr, n, 0, channel, ok) * one_plus
    beta = per_image(bias_ptr, n, 0, channel, ok) * one_plus
    return gamma, beta + per_image(offset_ptr, n, C, channel, ok)


@triton.jit
def load_sum(x_ptr, residual_ptr, skip_ptr, n, pixel, first, local, shift, ok, HW: tl.constexpr, C: tl.constexpr,
             C_X: tl.constexpr, OWN: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr,
             AHEAD: tl.constexpr):  # fmt: skip
    """cat(x + residual + shift, skip) [BHW, BC] as float32: x has C_X channels, skip the C - C_X others."""
    channel = first + local
    in_x = at(n, pixel, channel, HW, C_X)
    in_skip = at(n, pixel, channel - C_X, HW, C - C_X)
    if skip_ptr is None:
        u = load_terms(x_ptr + in_x, residual_ptr, in_x, ok, WHOLE, EVICT)
    elif C_X % OWN == 0 and not AHEAD:  # the seam lies between two programs; in a branch nothing is loaded ahead
        if first < C_X:
            u = load_terms(x_ptr + in_x, residual_ptr, in_x, ok, WHOLE, EVICT)
        else:
            u = load(skip_ptr + in_skip, ok, WHOLE, EVICT).to(tl.float32)
    else:
        u = load_terms(x_ptr + in_x, residual_ptr, in_x, ok & (channel < C_X)[None, :], False, EVICT)
        u += load(skip_ptr + in_skip, ok & (channel >= C_X)[None, :], False, EVICT).to(tl.float32)
    return u + shift[None, :]


@triton.jit
def load_terms(x_at, residual_ptr, offset, ok, WHOLE: tl.constexpr, EVICT: tl.constexpr):
    """x + residual."""
    u = load(x_at, ok, WHOLE, EVICT).to(tl.float32)
    if residual_ptr is not None:
        u += load(residual_ptr + offset, ok, WHOLE, EVICT).to(tl.float32)
    return u


@triton.jit
def store_parts(dx_ptr, dskip_ptr, v, n, pixel, first, local, ok, HW: tl.constexpr, C: tl.constexpr, C_X: tl.constexpr,
                OWN: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The inverse of the concatenation: the channels of v [BHW, BC] that are x's to dx, the others to dskip."""
    channel = first + local
    in_x = at(n, pixel, channel, HW, C_X)
    in_skip = at(n, pixel, channel - C_X, HW, C - C_X)
    if dskip_ptr is None:
        store(dx_ptr + in_x, v, ok, WHOLE)
    elif C_X % OWN == 0:
        if first < C_X:
            store(dx_ptr + in_x, v, ok, WHOLE)
        else:
            store(dskip_ptr + in_skip, v, ok, WHOLE)
    else:
        store(dx_ptr + in_x, v, ok & (channel < C_X)[None, :], False)
        store(dskip_ptr + in_skip, v, ok & (channel >= C_X)[None, :], False)


@triton.jit
def at(n, pixel, channel, HW: tl.constexpr, C: tl.constexpr):
    """Offsets [BHW, BC] of pixels and channels of image n in (N, HW, C); 64 bits, as N HW C may pass 2^31."""
    return n.to(tl.int64) * (HW * C) + (pixel[:, None] * C + channel[None, :])


@triton.jit
def ptx(INSTRUCTION: tl.constexpr, v):
    """One PTX instruction on each of the float32 numbers v."""
    return tl.inline_asm_elementwise(INSTRUCTION, "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(z):
    """1 / (1 + 2^(-z log2 e)) in 4 instructions, each wrong by at most 2 in the last place.

    Without .ftz, and with Triton's own division, the compiler adds 6 more for denormal numbers and for quotients near
    the ends of float32, where a sigmoid is 0 for all purposes.
    """
    if COMPILED:
        return ptx("rcp.approx.ftz.f32 $0, $1;", 1.0 + ptx("ex2.approx.ftz.f32 $0, $1;", z * -1.4426950408889634))
    else:
        return tl.sigmoid(z)


@triton.jit
def activate(centred, slope, beta, SILU: tl.constexpr):
    """centred = u - mean [BHW, BC], slope = gamma * rstd [BC] -> y before dropout."""
    z = centred * slope[None, :] + beta[None, :]
    if SILU:
        z = z * sigmoid(z)
    return z


@triton.jit
def grad_z(xhat, dy, gamma, beta, SILU: tl.constexpr):
    """dy (dropout already applied) [BHW, BC] -> gz, recomputing z from xhat."""
    if SILU:
        z = xhat * gamma[None, :] + beta[None, :]
        s = sigmoid(z)
        dy = dy * (s + z * s * (1.0 - s))
    return dy


@triton.jit
def dropped(v, seed_ptr, n, pixel, first, stream, threshold, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """v [BHW, BC] times the dropout factor; without a seed v itself."""
    if seed_ptr is not None:
        v = v * dropout_factor(seed_ptr, n, pixel, first, stream, threshold, C, BLOCK_C)
    return v

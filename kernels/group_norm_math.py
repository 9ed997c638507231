# ty: ignore[invalid-argument-type]  Triton's stubs do not describe how one kernel calls another
"""The mathematics that group_norm_silu's forward and backward kernels share, one tile at a time.

For image n, channel c of group g, pixel p (HW of them), with m = HW * channels per group:

    u     = x + shift[n, c]                                      what is normalised
    mean  = sum_g u / m          rstd = 1 / sqrt(sum_g (u - mean)^2 / m + eps)
    xhat  = (u - mean) * rstd
    gamma = weight * (1 + scale[n, c])      beta = bias * (1 + scale[n, c]) + offset[n, c]
    z     = gamma * xhat + beta
    y     = z * sigmoid(z) * drop                                drop = 0 or 1 / (1 - p), from Philox

Backward, with gz = dL/dz = dy * drop * s * (1 + z * (1 - s)), s = sigmoid(z):

    B[n, c] = sum_p gz           A[n, c] = sum_p gz * xhat       all other sums come from these two
    dx      = (gamma * gz - sum_g(gamma * B) / m - xhat * sum_g(gamma * A) / m) * rstd
    dshift  = sum_p dx           doffset = B                     dscale = weight * A + bias * B
    dweight = sum_n (1 + scale) * A                              dbias = sum_n (1 + scale) * B

Memory: an image is the row-major matrix [HW, C], so a tile of whole rows of BLOCK_C neighbouring channels is read in
16-byte pieces. One program owns one image and one block of whole groups, hence nothing is exchanged between programs
and every sum has a fixed order: the results are the same bits on every run. The blocks of one image are neighbours in
the grid, so that a 128-byte cache line shared by two blocks is fetched once. All arithmetic is float32.

Shapes in the comments: BHW = BLOCK_HW pixels, BC = BLOCK_C channels, BG = BLOCK_G groups; the first OWN of the BC
channels belong to the program, the rest pad to a power of two. Plain floats (eps) are constexpr: compiled code and
eager code would otherwise pass them in different precisions (float64 and float32).
"""

import triton
import triton.language as tl

from kernels.philox import dropout_factor


@triton.jit
def group_sum(v, local, PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """Per-channel numbers v [BC] -> their sums per group [BG]; local [BC] counts channels from the block's first."""
    group = tl.arange(0, BLOCK_G)
    member = (local // PER_GROUP)[None, :] == group[:, None]  # [BG, BC] one-hot: group sizes need not be powers of two
    return tl.sum(tl.where(member, v[None, :], 0.0), 1)  # where, not a product: a NaN stays in its own group


@triton.jit
def to_channels(v, local, PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """Per-group numbers v [BG] -> the same number at each of the group's channels [BC]."""
    group = tl.arange(0, BLOCK_G)
    member = (local // PER_GROUP)[None, :] == group[:, None]  # [BG, BC]
    return tl.sum(tl.where(member, v[:, None], 0.0), 0)


@triton.jit
def per_image(ptr, n, channel, ok, C: tl.constexpr):
    """Row n of an optional (N, C) tensor as float32 [BC]; zeros where the tensor was not given."""
    if ptr is None:
        return tl.zeros(channel.shape, tl.float32)
    else:
        return tl.load(ptr + n.to(tl.int64) * C + channel, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def affine(weight_ptr, bias_ptr, scale_ptr, offset_ptr, n, channel, ok, C: tl.constexpr):
    """gamma and beta [BC]: the learned affine map with the image's own scale and offset (AdaGN) folded in."""
    one_plus = 1.0 + per_image(scale_ptr, n, channel, ok, C)
    gamma = tl.load(weight_ptr + channel, mask=ok, other=0.0).to(tl.float32) * one_plus
    beta = tl.load(bias_ptr + channel, mask=ok, other=0.0).to(tl.float32) * one_plus
    return gamma, beta + per_image(offset_ptr, n, channel, ok, C)


@triton.jit
def activate(centred, slope, beta, SILU: tl.constexpr):
    """centred = u - mean [BHW, BC], slope = gamma * rstd [BC] -> y before dropout."""
    z = centred * slope[None, :] + beta[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def grad_z(xhat, dy, gamma, beta, SILU: tl.constexpr):
    """dy (dropout already applied) [BHW, BC] -> gz, recomputing z from xhat."""
    if SILU:
        z = xhat * gamma[None, :] + beta[None, :]
        s = tl.sigmoid(z)
        dy = dy * (s * (1.0 + z * (1.0 - s)))
    return dy


@triton.jit
def dropped(v, seed_ptr, n, pixel, first, stream, threshold, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """v [BHW, BC] times the dropout factor; without a seed v itself."""
    if seed_ptr is not None:
        v = v * dropout_factor(seed_ptr, n, pixel, first, stream, threshold, C, BLOCK_C)
    return v

# ty: ignore[invalid-argument-type]  Triton's stubs do not describe how one kernel calls another
"""Dropout's random bits: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A counter-based generator is a pure function (key, counter) -> 128 bits, so the backward pass draws the forward's mask
again instead of loading it. One call serves 8 neighbouring channels of a pixel with 16 bits each: a call an element
would cost more time than the memory traffic of the norm. 7 rounds are the fewest that pass BigCrush.

    key     = seed (64 bits)
    counter = (pixel * ceil(C / 8) + channel // 8, image, stream, 0)
    keep    = bits[channel % 8] >= threshold,   threshold = round(65536 p)

The mask depends on the position in the tensor alone, not on how a kernel cuts it into tiles.
"""

import torch

from .language import tl, triton

ROUNDS: tl.constexpr = tl.constexpr(7)


def threshold_of(p: float) -> int:
    """Dropout probability -> 16-bit threshold. The probability used is threshold / 65536, within 8e-6 of p."""
    return min(65535, round(65536 * p))


@triton.jit
def dropout_factor(seed_ptr, image, pixel, first_channel, stream, threshold, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """0 where an element is dropped and 1 / (1 - p) where it is kept, for one tile.

    seed_ptr int64 [1]; image and first_channel (a multiple of 8) scalars; pixel int32 [BHW]; -> float32 [BHW, BLOCK_C].
    """
    rows: tl.constexpr = pixel.shape[0]
    eights: tl.constexpr = (C + 7) // 8
    block = first_channel // 8 + tl.arange(0, BLOCK_C // 8)  # [BLOCK_C / 8]
    counter = pixel[:, None] * eights + block[None, :]  # [BHW, BLOCK_C / 8]
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), counter, zero + image, zero + stream, zero, ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BHW, BLOCK_C / 8, 2, 2]: w0 w1 w2 w3 in memory order
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [rows, BLOCK_C]).to(tl.int32)
    return tl.where(bits >= threshold, 65536.0 / (65536 - threshold), 0.0)


def dropout_factor_torch(seed: torch.Tensor, shape: torch.Size, stream: int, p: float) -> torch.Tensor:
    """The same factors for a whole (N, C, H, W) tensor in plain PyTorch: float32, on the seed's device."""
    n, c, h, w = shape
    low = 0xFFFFFFFF
    eights = -(-c // 8)
    words = [
        torch.arange(h * w * eights, device=seed.device).expand(n, -1),
        torch.arange(n, device=seed.device)[:, None].expand(-1, h * w * eights),
        seed.new_full((n, h * w * eights), stream),
        seed.new_zeros((n, h * w * eights)),
    ]
    key = [seed.reshape(()) & low, (seed.reshape(()) >> 32) & low]
    for _ in range(ROUNDS.value):
        a, b = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]  # 64-bit products, modulo 2^64
        words = [(b >> 32) & low ^ words[1] ^ key[0], b & low, (a >> 32) & low ^ words[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    bits = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)  # (N, HW * C/8, 8)
    bits = bits.reshape(n, h, w, eights * 8)[..., :c].permute(0, 3, 1, 2)
    threshold = threshold_of(p)
    return (bits >= threshold).float() * (65536 / (65536 - threshold))

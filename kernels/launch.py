"""Which tensors run Triton, and how a kernel's work is cut into programs.

Nothing here tunes at run time: the choices are arithmetic on shapes, so a user's start-up pays for no search.
"""

from dataclasses import dataclass
from math import isqrt, lcm
from typing import Any

import torch
from triton import knobs

# With TRITON_INTERPRET=1 in the environment before the first import of triton, `triton.jit` builds interpreted kernels.
INTERPRETED: bool = bool(knobs.runtime.interpret)


def runs_triton(x: torch.Tensor) -> bool:
    """CPU tensors run the PyTorch reference, or the kernels in Triton's interpreter; every other device runs Triton.

    There is no other branch on purpose: a kernel that fails on a GPU raises instead of becoming slow.
    """
    return INTERPRETED or x.device.type != "cpu"


def traceable(kernel: Any) -> Any:
    """The kernel as torch.compile can look into; the interpreter's, which nothing compiles, as it is (PyTorch 2.11's
    wrap_triton refuses those)."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def power_of_2(n: int) -> int:
    """The smallest power of two >= n; Triton's tiles have such sides."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class NormTiles:
    """How GroupNorm over an NHWC image [HW, C] is cut: one program per (image, block of whole groups).

    channels  channels a program owns (whole groups; a multiple of 8, so that bf16 rows start at 16-byte addresses)
    block_c   the tile's width, a power of two >= channels
    block_g   a power of two >= groups a program owns
    block_hw  the tile's height: a power of two >= HW, or the chunk of pixels of one loop iteration
    looped    the image does not fit in registers: sweep over chunks, re-reading them from L2
    """

    channels: int
    block_c: int
    block_g: int
    block_hw: int
    looped: bool
    num_warps: int


# Elements that one thread of a one-tile kernel holds, as float32. Counted by bench/aot.py: 64 of bf16 x compile to at
# most 128 registers without a spill on sm_80, sm_90 and sm_100, and 128 spill; 32 where x and dy are held, where x is
# fp32, where dropout and AdaGN come together (64 spill 8 to 24 bytes on sm_100), and for 8x8 and smaller, where 80
# registers in place of 128 let more programs share a multiprocessor.
TALL_ELEMENTS, ELEMENTS = 64, 32
# Elements of a chunk a thread in the looped kernels: two accumulators and two inputs of 16 stay under 128 registers, so
# that two programs of 8 warps share a multiprocessor; Philox needs registers too (171 with 16, 106 with 8).
LOOP_ELEMENTS, LOOP_ELEMENTS_DROPOUT = 16, 8
MAX_WARPS = 16
ONE_HOT = 4096  # entries of the [groups, channels] membership matrix, a few a thread


def norm_tiles(channels: int, pixels: int, groups: int, *, itemsize: int, backward: bool, dropout: bool = False,
               adaptive: bool = False) -> NormTiles:  # fmt: skip
    """Choose the tiles for x of shape (N, channels, H, W), pixels = H * W, itemsize bytes an element of x.

    N only sets the number of programs; dropout and adaptive (scale or offset given) cost registers.
    """
    per_group = channels // groups
    rows = power_of_2(pixels)
    unit = min(channels, lcm(per_group, 8))
    # Width falls with height (32 channels at 32x32, 64 at 16x16, 128 at 8x8): tiles of 8 to 32 k elements, whose rows
    # still fill whole 32-byte sectors. x + dy of a 32x32x32 tile are 128 KiB: 2 programs an SM (34 MB on H100) are well
    # within L2, the 3 that 80 registers allow (51 MB) just about: measure on a GPU.
    width = max(16, 2048 // itemsize // isqrt(rows))

    def fits(k: int) -> bool:
        block = power_of_2(k * unit)
        return block <= width and block * power_of_2(k * unit // per_group) <= ONE_HOT

    units = -(-channels // unit)
    own = min(channels, unit * max((k for k in range(1, units + 1) if units % k == 0 and fits(k)), default=1))
    block_c, block_g = max(8, power_of_2(own)), power_of_2(own // per_group)

    tall = rows > 64 and itemsize == 2 and not backward and not (dropout and adaptive)
    per_thread = TALL_ELEMENTS if tall else ELEMENTS
    # In the backward only 8x8 and smaller fit: at 16x16 the tile would need 64 elements of both x and dy a thread.
    largest = 8192 if backward else MAX_WARPS * 32 * per_thread
    if rows * block_c <= largest:
        num_warps = min(MAX_WARPS, max(4, rows * block_c // (32 * per_thread)))
        return NormTiles(own, block_c, block_g, rows, False, num_warps)
    num_warps = 8 if rows <= 1024 else MAX_WARPS  # above 32x32 one program an SM, to stay within L2
    chunk = num_warps * 32 * (LOOP_ELEMENTS_DROPOUT if dropout or itemsize > 2 else LOOP_ELEMENTS)
    return NormTiles(own, block_c, block_g, min(rows, max(1, chunk // block_c)), True, num_warps)

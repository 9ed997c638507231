"""Which tensors run Triton, and how a kernel's work is cut into programs.

Nothing here tunes at run time: the choices are arithmetic on shapes, so a user's start-up pays for no search.
"""

from dataclasses import dataclass, replace
from math import isqrt, lcm
from typing import Any

import torch

from .language import INTERPRETED, TRITON_INSTALLED
from .tuned import NORM_TILES


def runs_triton(x: torch.Tensor) -> bool:
    """CPU tensors run the PyTorch reference, or the kernels in Triton's interpreter; every other device runs Triton.

    There is no other branch on purpose: a kernel that fails on a GPU raises instead of becoming slow.
    """
    return INTERPRETED or x.device.type != "cpu"


def traceable(kernel: Any) -> Any:
    """The kernel as torch.compile can look into; the interpreter's, which nothing compiles, as it is (PyTorch 2.11's
    wrap_triton refuses those). Raises ModuleNotFoundError where Triton is missing."""
    if not TRITON_INSTALLED:
        raise ModuleNotFoundError("this kernel needs Triton, which is not installed here", name="triton")
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def power_of_2(n: int) -> int:
    """The smallest power of two >= n; Triton's tiles have such sides."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class NormTiles:
    """How GroupNorm over an NHWC image [HW, C] is cut: into tiles, one for each (image, block of whole groups).

    channels  channels a program owns (whole groups; a multiple of 8, so that bf16 rows start at 16-byte addresses)
    block_c   the tile's width, a power of two >= channels
    block_g   a power of two >= groups a program owns
    block_hw  the tile's height: a power of two >= HW, or the chunk of pixels of one loop iteration
    looped    the image does not fit in registers: sweep over chunks, re-reading them from L2
    ahead     0: a program for each tile, which loads what it needs. Else programs load ahead while they compute: looped
              ones the next chunk; others, so many a multiprocessor, stay and load the next of their tiles
    """

    channels: int
    block_c: int
    block_g: int
    block_hw: int
    looped: bool
    num_warps: int
    ahead: int = 0

    def shared_bytes(self, images: int, itemsize: int) -> int:
        """Shared memory that a program may need that loads ahead: two tiles or chunks of each image that it reads, as
        many float32 as its warps exchange for a sum and spread over channels, and vectors."""
        tile = self.block_hw * self.block_c * itemsize
        return 2 * images * tile + 12 * self.num_warps * self.block_c + 2048


# Elements that one thread of a one-tile kernel holds, as float32: 64 of bf16 x take about 100 registers, and 128 some
# 170, with which one or two programs share a multiprocessor; 32 where x and dy are held, where x is fp32, where dropout
# and AdaGN come together, and for 8x8 and smaller, where 64 registers let eight programs share one.
TALL_ELEMENTS, ELEMENTS = 64, 32
# Elements of a chunk a thread in the looped kernels: 16 take 80 registers in the backward, so that three programs of 8
# warps share a multiprocessor; Philox needs registers too (128 with 16, 94 with 8).
LOOP_ELEMENTS, LOOP_ELEMENTS_DROPOUT = 16, 8
MAX_WARPS = 16
ONE_HOT = 4096  # entries of the [groups, channels] membership matrix, a few a thread


def norm_tiles(channels: int, pixels: int, groups: int, *, itemsize: int, backward: bool, dropout: bool = False,
               adaptive: bool = False) -> NormTiles:  # fmt: skip
    """Choose the tiles for x of shape (N, channels, H, W), pixels = H * W, itemsize bytes an element of x.

    The shapes of the CIFAR-10 U-Net have been measured, see kernels/tuned.py; others follow a rule that comes close to
    it. N only sets the number of programs; dropout and adaptive (scale or offset given) cost registers.
    """
    rows = power_of_2(pixels)
    tuned = NORM_TILES.get((channels, pixels, groups, backward, dropout))
    if tuned is not None and itemsize == 2 and not adaptive:
        own, block_hw, num_warps, ahead = tuned
        return _tiles(own, channels // groups, block_hw, block_hw < rows, num_warps, ahead)

    # Narrow tiles, so that several programs share a multiprocessor and one computes while others wait for memory; but
    # rows of whole 32-byte sectors.
    width = max(16, 1024 // itemsize // isqrt(rows))
    tile = _tiles(_own_channels(channels, groups, width), channels // groups, rows, False, 0)
    tall = rows > 64 and itemsize == 2 and not backward and not (dropout and adaptive)
    # Everything at once spills 8 bytes in the backward at 32.
    per_thread = TALL_ELEMENTS if tall else ELEMENTS // 2 if backward and dropout and adaptive else ELEMENTS
    # In the backward a taller tile would need 64 elements of both x and dy a thread, or all of a multiprocessor.
    if rows * tile.block_c <= (8192 if backward else MAX_WARPS * 32 * per_thread):
        return replace(tile, num_warps=min(MAX_WARPS, max(4, rows * tile.block_c // (32 * per_thread))))
    num_warps = 8 if rows <= 1024 else MAX_WARPS  # above 32x32 one program an SM, to stay within L2
    chunk = num_warps * 32 * (LOOP_ELEMENTS_DROPOUT if dropout or itemsize > 2 else LOOP_ELEMENTS)
    loop = _tiles(_own_channels(channels, groups, 2 * width), channels // groups, rows, True, num_warps)
    return replace(loop, block_hw=min(rows, max(1, chunk // loop.block_c)))


def _own_channels(channels: int, groups: int, width: int) -> int:
    """Channels of a program: whole groups, a divisor of all if possible, padded to at most `width` if possible."""
    per_group = channels // groups
    unit = min(channels, lcm(per_group, 8))

    def fits(k: int) -> bool:
        block = power_of_2(k * unit)
        return block <= width and block * power_of_2(k * unit // per_group) <= ONE_HOT

    units = -(-channels // unit)
    return min(channels, unit * max((k for k in range(1, units + 1) if units % k == 0 and fits(k)), default=1))


def _tiles(own: int, per_group: int, block_hw: int, looped: bool, num_warps: int, ahead: int = 0) -> NormTiles:
    return NormTiles(own, max(8, power_of_2(own)), power_of_2(own // per_group), block_hw, looped, num_warps, ahead)


def gpu_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that one program may use; in the interpreter 1 and 64 KiB."""
    if INTERPRETED:
        return 1, 65536
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin

# ty: ignore[invalid-argument-type]  Triton's stubs do not describe how one kernel calls another
"""Three matrices side by side, and the sums of their columns: the backward of one linear layer for q, k and v.

    merged = [a | b | c]  (R, 3 C)               sums = sum over the R rows of merged  (3 C,)

Attention returns the gradients of q, k and v one by one; the layer's two matrix products want them as one matrix, and
its bias wants the sums. One pass does both, 4 bytes an element in bf16; a concatenation and then a sum move 6.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .language import tl, triton, triton_op
from .launch import power_of_2, runs_triton, traceable
from .spec import Case, Inputs, Job, KernelSpec

# 16-byte accesses (8 bf16 of a thread's 32) of rows of 128 bytes.
BLOCK_R, BLOCK_C, WARPS = 64, 64, 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = 256  # of a program: 512 programs for 128 images at 16x16 and 256 channels, and 128 sums a column to add up


def reference(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    merged = torch.cat([v.flatten(0, -2) for v in (a, b, c)], 1)
    return merged, merged.sum(0, dtype=torch.promote_types(merged.dtype, torch.float32))


@triton.jit(do_not_specialize=["R"])
def merge_kernel(
    a_ptr,  # (R, C) bf16, fp16 or fp32
    b_ptr,  # (R, C) like a
    c_ptr,  # (R, C) like a
    merged_ptr,  # (R, 3 C) like a
    part_ptr,  # (programs along R, 3 C) fp32: the sums of each program's rows
    R,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    part = part_ptr + block.to(tl.int64) * 3 * C + column  # [BC]
    for which in tl.static_range(3):
        if which == 0:
            source = a_ptr
        elif which == 1:
            source = b_ptr
        else:
            source = c_ptr
        total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for i in range(0, ROWS, BLOCK_R):
            row = block * ROWS + i + tl.arange(0, BLOCK_R)  # [BR]
            ok = (row < R)[:, None] & (column < C)[None, :]
            at = row.to(tl.int64)[:, None]
            v = tl.load(source + at * C + column[None, :], mask=ok, other=0.0)
            tl.store(merged_ptr + at * (3 * C) + which * C + column[None, :], v, mask=ok)
            total += v.to(tl.float32)
        tl.store(part + which * C, tl.sum(total, 0), mask=column < C)


def blocks(columns: int) -> dict[str, int]:
    """The kernel's compile-time constants."""
    return {"C": columns, "ROWS": ROWS, "BLOCK_R": BLOCK_R, "BLOCK_C": min(BLOCK_C, power_of_2(columns))}


def _results(a: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = a.shape
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.new_empty((rows, 3 * columns)), a.new_empty(((rows + ROWS - 1) // ROWS, 3 * columns), dtype=wide)


@triton_op("fastdiff_kernels::merge_columns", mutates_args={})
def _merge(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """a, b, c (R, C), contiguous -> merged and, for each program of the kernel, the sums of its rows."""
    rows, columns = a.shape[0], int(a.shape[1])
    merged, parts = _results(a)
    if not runs_triton(a):
        merged = torch.cat([a, b, c], 1)
        padded = F.pad(merged.to(parts.dtype), (0, 0, 0, parts.shape[0] * ROWS - rows))
        return merged, padded.reshape(parts.shape[0], ROWS, 3 * columns).sum(1)
    if rows > 0 and columns > 0:
        constants = blocks(columns)
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, constants["BLOCK_C"]))
        traceable(merge_kernel)[grid](a, b, c, merged, parts, rows, **constants, num_warps=WARPS)
    return merged, parts


@_merge.register_fake
def _(a, b, c):
    return _results(a)


def merge_columns(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """-> [a | b | c], (R, 3 C) in a's dtype, and its column sums, (3 C,) in float32. Not differentiable.

    a, b, c     (..., C) of one shape and dtype (bf16, fp16, fp32; float64 too on a CPU); their R rows are all but the
                last dimension. Copied first unless contiguous

    Sums are float32 in a fixed order: two runs agree bit for bit.

    Raises ValueError for shapes or devices, TypeError for dtypes.
    """
    for name, v in (("b", b), ("c", c)):
        if v.shape != a.shape or v.device != a.device:
            raise ValueError(f"{name} must be {tuple(a.shape)} on {a.device}, as a; got {tuple(v.shape)} on {v.device}")
        if v.dtype != a.dtype:
            raise TypeError(f"{name} must be {a.dtype}, as a; got {v.dtype}")
    if a.dim() < 2:
        raise ValueError(f"a must be a matrix or more, got {tuple(a.shape)}")
    if a.dtype not in DTYPES and (a.dtype != torch.float64 or runs_triton(a)):
        raise TypeError(f"a must be bfloat16, float16 or float32, got {a.dtype} on {a.device}")
    merged, parts = _merge(*(v.flatten(0, -2).contiguous() for v in (a, b, c)))
    return merged, parts.sum(0)


def linear_qkv(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (..., C), of one linear layer: `F.linear(x, weight, bias).chunk(3, -1)`. Differentiable once.

    x       (..., C_in)
    weight  (3 C, C_in)
    bias    (3 C,); its gradient is a result of `merge_columns`
    """
    return _Chunks.apply(F.linear(x, weight, bias.detach()), bias)


class _Chunks(torch.autograd.Function):
    """(..., 3 C) -> three views (..., C); `bias` is in them already and only gets its gradient here."""

    @staticmethod
    def forward(ctx: Any, merged: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        ctx.shape, ctx.dtype = merged.shape, bias.dtype
        return merged.chunk(3, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        merged, sums = merge_columns(*gradients)
        return merged.view(ctx.shape), sums.to(ctx.dtype)


def _case(name: str, *shape: int) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        return {key: torch.randn(shape, generator=generator).to(dtype) for key in "abc"}

    return Case(name, make)


def _jobs() -> Iterator[Job]:
    """At the width of the U-Net's attention, and of a wider one."""
    images = frozenset({"a_ptr", "b_ptr", "c_ptr", "merged_ptr"})
    types = dict.fromkeys(sorted(images), "*bf16") | {"part_ptr": "*fp32", "R": "i32"}
    for channels in (256, 512):
        yield Job(f"C={channels}", f"{__name__}:merge_kernel", types, blocks(channels), WARPS, images)


def _min_bytes(inputs: Inputs) -> tuple[int, int]:
    return sum(2 * inputs[name].nbytes for name in "abc"), 0


SPEC = KernelSpec(
    name="merge_columns",
    op=merge_columns,
    reference=reference,
    cases=(
        _case("q, k and v", 2, 1, 128, 64),
        _case("ragged", 3, 1, 47, 40),
        _case("more columns than a block", 130, 200),
        _case("many programs", 5, 150, 24),
        _case("one row", 1, 8),
        _case("no rows", 0, 16),
    ),
    dtypes=DTYPES,
    min_bytes=_min_bytes,
    category="attention",
    jobs=_jobs,
)

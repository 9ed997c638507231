"""Compile every kernel ahead of time for sm_80, sm_90 and sm_100 (no GPU needed) and tabulate what ptxas made of it.

    python bench/aot.py                     writes bench/results/aot.md
    python bench/aot.py --sm 90 --print     to the terminal, one architecture

Two promises are checked: no kernel spills (stack 0), and every access of x, y, dx, dy and other images (for the flat
kernels: of every buffer) moves 16 bytes a thread. Exits 1 if one is broken.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `kernels` must be this repository's

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.compiled_code import access_widths, loads_ahead, resources
from kernels import adam_ema, ema
from kernels.group_norm_backward import backward_loop, backward_tile, column_sums
from kernels.group_norm_forward import forward_loop, forward_tile
from kernels.launch import NormTiles, norm_tiles, sum_blocks
from kernels.merge_columns import WARPS as MERGE_WARPS
from kernels.merge_columns import blocks as merge_blocks
from kernels.merge_columns import merge_kernel

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory of a multiprocessor, of others as of the least (86, 89, 120); a program takes 1 KiB besides.
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHARED_ELSEWHERE = 100 * 1024
# GroupNorm's (C, H = W) in the DDPM CIFAR-10 U-Net, 32 groups.
UNET_SHAPES = (
    (128, 32),
    (256, 32),
    (384, 32),
    (128, 16),
    (256, 16),
    (384, 16),
    (512, 16),
    (256, 8),
    (512, 8),
    (256, 4),
    (512, 4),
)
# (C, H = W) of its skip concatenations -> channels of the first part.
CONCATENATIONS = {(256, 32): 128, (384, 32): 256, (384, 16): 256, (512, 16): 256, (512, 8): 256, (512, 4): 256}
# What a call site switches on: SiLU alone, nothing (attention's norm), the time embedding, dropout, AdaGN, everything;
# and for add_group_norm_silu a residual with a bias, on the way up with a skip, on the way down kept for one.
VARIANTS = {
    "plain": (),
    "none": ("none",),
    "shift": ("shift",),
    "dropout": ("seed",),
    "shift+dropout": ("shift", "seed"),
    "adagn": ("scale", "offset"),
    "all": ("shift", "scale", "offset", "seed"),
    "add": ("shift", "residual"),
    "add, none": ("shift", "residual", "none"),
    "add, kept": ("shift", "residual", "du2"),
}
WIDE = {"x_ptr", "y_ptr", "dy_ptr", "dx_ptr"}  # pointers whose every access must be 16 bytes
WIDE_SUM = {"residual_ptr", "u_ptr", "du_ptr"}  # and of add_group_norm_silu
WIDE_MORE = {"skip_ptr", "dskip_ptr", "du2_ptr"}


@dataclass(frozen=True)
class Job:
    """One kernel, its argument types and constants, as Triton's ahead-of-time compiler wants them."""

    label: str
    kernel: str
    types: dict[str, str]  # argument -> "*bf16", "i32", ...; absent ones are constants
    constants: Mapping[str, object]
    num_warps: int


@dataclass(frozen=True)
class Row:
    """What came out. `narrow` lists the accesses of the main tensors that are not 16 bytes wide."""

    job: Job
    sm: int
    registers: int
    stack: int
    shared: int
    programs: int  # that one multiprocessor holds
    ahead: bool  # while it computes, copies to shared memory that it started are on their way
    wide: int
    narrow: tuple[str, ...]


KERNELS = {
    fn.__name__: fn
    for fn in (
        forward_tile,
        forward_loop,
        backward_tile,
        backward_loop,
        column_sums,
        ema.ema_kernel,
        adam_ema.adam_ema_kernel,
        merge_kernel,
    )
}


def norm_jobs(channels: int, side: int, variant: str, dtype: str = "bf16", groups: int = 32, *,
              tiles: NormTiles | None = None) -> Iterator[Job]:  # fmt: skip
    """Forward and backward of group_norm_silu at one shape, in the tiles that launch.py chooses or in others."""
    options = VARIANTS[variant]
    for backward in (False, True):
        cut = tiles or norm_tiles(channels, side * side, groups, itemsize=2 if dtype == "bf16" else 4,
                                  backward=backward, dropout="seed" in options,
                                  adaptive="scale" in options)  # fmt: skip
        kernel = ("backward" if backward else "forward") + ("_loop" if cut.looped else "_tile")
        summed, c_x = "residual" in options, channels
        if summed and "du2" not in options:
            c_x = CONCATENATIONS.get((channels, side), channels)
        wide = WIDE | (WIDE_SUM if summed else set()) | ({"skip_ptr", "dskip_ptr"} if c_x < channels else set())
        wide |= {"du2_ptr"} if "du2" in options else set()
        types = dict.fromkeys(wide, f"*{dtype}")
        types |= {
            f"{name}_ptr": f"*{dtype}"
            for name in ("shift", "scale", "offset", "dshift", "dscale", "doffset")
            if name.removeprefix("d") in options
        }
        types |= {f"{name}_ptr": "*fp32" for name in ("weight", "bias", "mean", "rstd", "part_weight", "part_bias")}
        if summed:  # the biases of convolutions are rows of float32; in the backward they are in u already
            types["shift_ptr"], types["dshift_ptr"] = ("constexpr" if backward else "*fp32"), "*fp32"
        types |= dict.fromkeys(("affine_row", "shift_row", "stream_id", "threshold", "N"), "i32")
        types |= {"seed_ptr": "*i64"} if "seed" in options else {}
        constants = {"EPS": 1e-6, "SILU": "none" not in options, "C": channels, "C_X": c_x, "HW": side * side,
                     "PER_GROUP": channels // groups, "OWN": cut.channels, "BLOCK_C": cut.block_c,
                     "BLOCK_G": cut.block_g, "BLOCK_HW": cut.block_hw,
                     "AHEAD": cut.ahead > 0}  # fmt: skip
        label = f"C={channels} {side}x{side} {variant}" + (f", ahead {cut.ahead}" if cut.ahead else "")
        yield Job(
            label + ("" if dtype == "bf16" else f" {dtype}"),
            kernel,
            types,
            constants,
            cut.num_warps,
        )


def flat_jobs() -> Iterator[Job]:
    """The kernels over flat buffers, and the column sums of the norm's backward."""
    buffers = {
        f"{name}_ptr": "*fp32"
        for name in ("param", "grad", "exp_avg", "exp_avg_sq", "ema", "lr", "decay", "clip", "step")
    }
    buffers |= {"half_ptr": "*bf16", "n": "i32"}
    constants = adam_ema.constants(0.9, 0.999, 1e-8, 0.0)
    yield Job("35.7 M parameters", "adam_ema_kernel", buffers, constants, adam_ema.WARPS)
    yield Job(
        "bf16 gradient, weight decay",
        "adam_ema_kernel",
        buffers | {"grad_ptr": "*bf16"},
        constants | {"WEIGHT_DECAY": 0.01},
        adam_ema.WARPS,
    )
    yield Job("35.7 M parameters", "ema_kernel", buffers, {"BLOCK": ema.BLOCK}, ema.WARPS)
    sums = {f"{name}_ptr": "*fp32" for name in ("part_weight", "part_bias", "dweight", "dbias")} | {"N": "i32"}
    for channels in sorted({c for c, _ in UNET_SHAPES}):
        yield Job(
            f"C={channels}",
            "column_sums",
            sums,
            {"C": channels, **sum_blocks(channels)},
            4,
        )


def merge_jobs() -> Iterator[Job]:
    """The gradients of q, k and v, at the widths of the U-Net's attention and of wider ones."""
    types = {f"{name}_ptr": "*bf16" for name in ("a", "b", "c", "merged")} | {"part_ptr": "*fp32", "R": "i32"}
    for channels in (256, 512):
        yield Job(f"C={channels}", "merge_kernel", types, merge_blocks(channels), MERGE_WARPS)


def all_jobs() -> list[Job]:
    """Every kernel at every shape of the U-Net, with every combination of options that a call site uses."""
    jobs = [job for channels, side in UNET_SHAPES for variant in VARIANTS for job in norm_jobs(channels, side, variant)]
    jobs += [
        job for shape in ((384, 32), (128, 16)) for v in ("all", "add") for job in norm_jobs(*shape, v, dtype="fp32")
    ]
    jobs += list(norm_jobs(128, 64, "shift+dropout"))
    return jobs + list(flat_jobs()) + list(merge_jobs())


def build(job: Job, sm: int) -> Row:
    """Compile one kernel for one architecture."""
    fn = KERNELS[job.kernel]
    types = {name: job.types.get(name, "constexpr") for name in fn.arg_names}
    if any(
        name.isupper() and len(name) > 1 and types[name] == "constexpr" and name not in job.constants
        for name in fn.arg_names
    ):
        raise ValueError(f"{job.kernel} needs constants {[n for n in fn.arg_names if n.isupper()]}")
    constants = {name: job.constants.get(name) for name, kind in types.items() if kind == "constexpr"}
    # What the launcher tells the compiler of allocations, of n = 35,746,304 padded to a multiple of 16, and of rows: 0
    # apart where all images share them, else slices of a wide tensor.
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(fn.arg_names)
        if types[name].startswith("*") or name in ("n", "affine_row", "shift_row")
    }
    source = ASTSource(fn=fn, signature=types, constexprs=constants, attrs=divisible)
    options = {"num_warps": job.num_warps, "enable_fp_fusion": True}  # a launch's default in Triton 3.9
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    registers, stack = resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    # Registers come in units of 8 a thread; a multiprocessor has 65,536, and 2048 threads.
    threads = 32 * job.num_warps
    programs = min(
        65536 // (-(-registers // 8) * 8 * threads),
        2048 // threads,
        SHARED.get(sm, SHARED_ELSEWHERE) // (shared + 1024),
        32,
    )
    passed = [name for name in fn.arg_names if types[name] != "constexpr"]
    scalars = {"step_ptr", "lr_ptr", "decay_ptr", "clip_ptr", "part_ptr"}
    main = (
        WIDE | WIDE_SUM | WIDE_MORE
        if WIDE & set(passed)
        else {name for name in passed if name.endswith("_ptr")} - scalars
    )
    widths = (
        access_widths(compiled.asm["ptx"], {i for i, name in enumerate(passed) if name in main})
        if job.kernel != "column_sums"
        else []
    )
    return Row(
        job,
        sm,
        registers,
        stack,
        shared,
        programs,
        loads_ahead(compiled.asm["ttgir"]),
        sum(w == 16 for w in widths),
        tuple(f"{w} B" for w in widths if w != 16),
    )


def table(rows: list[Row]) -> str:
    """The rows as a Markdown document."""
    spills = sum(r.stack > 0 for r in rows)
    wide = sum(r.wide for r in rows)
    accesses = wide + sum(len(r.narrow) for r in rows)
    lines = [
        "# Kernels compiled ahead of time",
        "",
        f"Written by `python bench/aot.py` with triton {triton.__version__}: {len(rows)} binaries.",
        "Compiled without a GPU: counts, not times.",
        "",
        f"- kernels with a stack frame (spills): {spills} of {len(rows)}",
        f"- 16-byte accesses of x, y, dx, dy and of the flat buffers: {wide} of {accesses}",
        "",
        "Tile: pixels x channels that a program holds, or sweeps in chunks. Programs: how many a multiprocessor holds",
        "at once, by registers, threads and shared memory. Occupancy: their share of its 2048 threads. Width: 16-byte",
        "accesses of the main tensors in the code, of all.",
        "",
        "| kernel | case | sm | tile | warps | registers | stack | shared, B | programs | occupancy | width |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        c = r.job.constants
        tile = (
            f"{c['BLOCK_HW']} x {c['OWN']}"
            if "OWN" in c
            else str(c.get("BLOCK", f"{c.get('BLOCK_N')} x {c.get('BLOCK_C')}"))
        )
        occupancy = f"{r.programs * r.job.num_warps * 32 / 2048:.0%}"
        width = f"{r.wide} / {r.wide + len(r.narrow)}" if r.wide + len(r.narrow) else "-"
        cells = (
            r.job.kernel,
            r.job.label,
            r.sm,
            tile,
            r.job.num_warps,
            r.registers,
            r.stack,
            r.shared,
            r.programs,
            occupancy,
            width,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def sound(row: Row) -> bool:
    """No spills, no narrow accesses, and room for a second program beside a looped backward of 8 warps."""
    return row.stack == 0 and not row.narrow and (row.job.kernel != "backward_loop" or row.registers <= 128)


def build_one(work: tuple[Job, int]) -> Row:
    """`build` for the map of a pool."""
    return build(*work)


def build_all(work: list[tuple[Job, int]]) -> list[Row]:
    """Compile in as many processes as there are cores; about half a second a binary."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(build_one, work))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile every kernel ahead of time and tabulate registers, spills and access widths."
    )
    parser.add_argument(
        "--sm", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities (default: 80 90 100)"
    )
    parser.add_argument("--only", default="", help="only kernels or cases whose name contains this text")
    parser.add_argument("--print", action="store_true", help="print the table instead of writing bench/results/aot.md")
    args = parser.parse_args()
    rows = build_all([(job, sm) for job in all_jobs() for sm in args.sm if args.only in f"{job.kernel} {job.label}"])
    text = table(rows)
    if args.print:
        print(text)
    else:
        path = Path(__file__).parent / "results" / "aot.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(f"wrote {path.name}: {len(rows)} binaries")
    broken = [r for r in rows if r.stack or r.narrow]
    for r in broken:
        print(
            f"sm_{r.sm} {r.job.kernel} {r.job.label}: stack {r.stack}, narrow accesses {sorted(set(r.narrow))}",
            file=sys.stderr,
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compile every kernel ahead of time for sm_80, sm_90 and sm_100 (no GPU needed) and tabulate what ptxas made of it.

    python bench/aot.py                     writes bench/results/aot.md
    python bench/aot.py --sm 90 --print     to the terminal, one architecture

Two promises are checked: no kernel spills (stack 0), and every access of x, y, dx, dy and other images (for the flat
kernels: of every buffer) moves 16 bytes a thread. Exits 1 if one is broken.
"""

import argparse
import importlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `kernels` must be this repository's

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.compiled_code import access_widths, loads_ahead, resources
from kernels import REGISTRY
from kernels.spec import Job

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory of a multiprocessor, of others as of the least (86, 89, 120); a program takes 1 KiB besides.
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHARED_ELSEWHERE = 100 * 1024


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


def all_jobs() -> list[Job]:
    """Every kernel at every shape of the U-Net, with every combination of options that a call site uses."""
    return [job for spec in REGISTRY.values() for job in spec.jobs()]


def function(job: Job) -> Any:
    """The kernel itself."""
    module, _, name = job.kernel.partition(":")
    return getattr(importlib.import_module(module), name)


def build(job: Job, sm: int) -> Row:
    """Compile one kernel for one architecture."""
    fn = function(job)
    types = {name: job.types.get(name, "constexpr") for name in fn.arg_names}
    if missing := [
        name
        for name, kind in types.items()
        if kind == "constexpr" and name.isupper() and len(name) > 1 and name not in job.constants
    ]:
        raise ValueError(f"{job.kernel} needs the constants {missing}")
    constants = {name: job.constants.get(name) for name, kind in types.items() if kind == "constexpr"}
    divisible = {  # what the launcher tells the compiler: of allocations, and of some numbers
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(fn.arg_names)
        if types[name].startswith("*") or name in job.divisible
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
    widths = access_widths(compiled.asm["ptx"], {i for i, name in enumerate(passed) if name in job.wide})
    narrow = tuple(f"{w} B" for w in widths if w != 16)
    ahead = loads_ahead(compiled.asm["ttgir"])
    return Row(job, sm, registers, stack, shared, programs, ahead, sum(w == 16 for w in widths), narrow)


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
            else str(c.get("BLOCK", f"{c.get('BLOCK_R')} x {c.get('BLOCK_C')}"))
        )
        occupancy = f"{r.programs * r.job.num_warps * 32 / 2048:.0%}"
        width = f"{r.wide} / {r.wide + len(r.narrow)}" if r.wide + len(r.narrow) else "-"
        cells = (
            r.job.name,
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
    return row.stack == 0 and not row.narrow and (row.job.name != "backward_loop" or row.registers <= 128)


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
    rows = build_all([(job, sm) for job in all_jobs() for sm in args.sm if args.only in f"{job.name} {job.label}"])
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
            f"sm_{r.sm} {r.job.name} {r.job.label}: stack {r.stack}, narrow accesses {sorted(set(r.narrow))}",
            file=sys.stderr,
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

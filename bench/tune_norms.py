"""Which tiles are fastest for GroupNorm + SiLU on the GPU at hand.

    python bench/tune_norms.py                 # the rule of kernels/launch.py beside the best of its alternatives
    python bench/tune_norms.py --out tuned.py  # and the best ones into a file, pass by pass
    python bench/tune_norms.py --write         # that file is kernels/tuned.py

What is timed are the calls of the CIFAR-10 U-Net's training step, with the sums that they form and the gradients that
they add; of those that share tiles, the most frequent one. Times are device times over buffers that are not in L2, as
multiples of a device copy of the same bytes. Tiles that spill registers are not tried, nor more resident programs than
a multiprocessor holds, nor loading ahead where that takes more shared memory than a program may have. Written tiles
spill for no call site with the same key, on no architecture.
"""

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from torch import Tensor

import kernels
from bench import aot
from bench.norm_calls import GROUPS, Task, all_tasks
from bench.timing import rotations
from fastdiff.cli import run_command
from fastdiff.runs.files import write_atomically
from fastdiff.runtime.device import REPO, environment
from kernels import launch
from kernels.group_norm_jobs import VARIANTS, norm_jobs
from kernels.launch import NormTiles
from kernels.spec import Job

EPS = 1e-6
WIDTHS = {32: (16, 32, 64), 16: (32, 64), 8: (64, 128), 4: (128, 256, 512)}  # channels of a tile, by its height
WARPS_AHEAD = (8, 12, 16, 24)  # of a multiprocessor, where programs stay and load tiles ahead
GAIN = 0.98  # of the rule's time; what gains less is noise


@dataclass(frozen=True)
class Timed:
    """Tiles, and their time as a multiple of a device copy's."""

    ratio: float
    tiles: NormTiles


def candidates(task: Task) -> Iterator[NormTiles]:
    """The rule's tiles first, then others: whole images that fit in registers, and sweeps over chunks; each without
    and with loading ahead."""
    yield task.rule
    channels, pixels, per_group = task.call.channels, task.call.side**2, task.call.channels // GROUPS
    for width in WIDTHS[task.call.side]:
        own = launch._own_channels(channels, GROUPS, width)
        block_c = launch.power_of_2(own)
        for warps in (4, 8, 16):
            if 8 <= pixels * block_c / (32 * warps) <= 64:
                yield launch._tiles(own, per_group, pixels, False, warps)
                for ahead in sorted({n // warps for n in WARPS_AHEAD} - {0}):
                    if channels // own >= 2 * ahead:  # at batch 128, about two tiles a program and more
                        yield launch._tiles(own, per_group, pixels, False, warps, ahead)
            for held in (8, 16):  # elements a thread of a chunk
                chunk = warps * 32 * held // block_c
                if task.call.side >= 16 and chunk < pixels and not (task.call.dropout and held == 16):
                    yield from (launch._tiles(own, per_group, chunk, True, warps, ahead) for ahead in (0, 1))


def moved(task: Task, batch: int) -> int:
    """Bytes of the images that a pass reads and writes."""
    return 2 * batch * task.call.side**2 * task.call.moved[task.backward]


def calls(task: Task, tiles: NormTiles, copies: int, batch: int, device: torch.device) -> list[Callable[[], object]]:
    """One call for each set of buffers."""
    ops, call = torch.ops.fastdiff_kernels, task.call
    c, own, silu = call.channels, call.own, call.silu
    weight, bias = (torch.randn(c, device=device) for _ in range(2))
    seed = torch.ones(1, dtype=torch.int64, device=device) if call.dropout else None
    embedding, conv_bias = torch.randn(batch, 1664, device=device).bfloat16(), torch.randn(own, device=device)
    shift = embedding[:, -c:] if call.dropout else conv_bias.expand(batch, own)

    def image(channels: int) -> Tensor:
        shape = (batch, call.side, call.side, channels)
        return torch.randn(shape, device=device, dtype=torch.bfloat16).permute(0, 3, 1, 2)

    def make() -> Callable[[], object]:
        dy = image(c)
        if call.dropout:
            given = (image(c), weight, bias, shift, None, None, seed)
            if not task.backward:
                return lambda: ops.group_norm_silu(*given, GROUPS, EPS, True, 0.1, 0)
            _, mean, rstd = ops.group_norm_silu(*given, GROUPS, EPS, True, 0.1, 0)
            return lambda: ops.group_norm_silu_backward(dy, *given, mean, rstd, GROUPS, True, 0.1, 0)
        residual, skip = image(own) if call.residual else None, image(c - own) if own < c else None
        terms = (image(own), residual, skip, weight, bias, shift)
        if not task.backward:
            return lambda: ops.add_group_norm_silu(*terms, GROUPS, EPS, silu)
        _, u, _, mean, rstd = ops.add_group_norm_silu(*terms, GROUPS, EPS, silu)
        du, du2 = (image(c) if call.gradients > i else None for i in range(2))
        return lambda: ops.add_group_norm_silu_backward(
            dy, du, du2, u, weight, bias, shift, mean, rstd, GROUPS, silu, own
        )

    def with_tiles(fn: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with mock.patch.object(sys.modules["kernels.group_norm_launch"], "norm_tiles", return_value=tiles):
                return fn()

        return run

    return [with_tiles(make()) for _ in range(copies)]


def fits(task: Task, tiles: NormTiles, sm: int) -> bool:
    """Whether the kernel for compute capability `sm` keeps to its registers, and as many programs as should stay fit
    on a multiprocessor."""
    ((job, _),) = jobs(task, tiles, (task.call.variant,), (sm,))
    row = aot.build(job, sm)
    return row.stack == 0 and (tiles.looped or tiles.ahead <= row.programs)


def jobs(task: Task, tiles: NormTiles, variants: Iterable[str], architectures: Iterable[int]) -> list[tuple[Job, int]]:
    """The task's kernel in these tiles, for bench/aot.py to compile."""
    passes = [tuple(norm_jobs(task.call.channels, task.call.side, v, groups=GROUPS, tiles=tiles)) for v in variants]
    return [(both[task.backward], sm) for both in passes for sm in architectures]


def call_sites(task: Task) -> list[str]:
    """All that may be switched on in calls that take the tiles of the task's key."""
    return [v for v, on in VARIANTS.items() if ("seed" in on) == task.call.dropout and "scale" not in on]


def compile_one(work: tuple[Task, NormTiles, torch.device]) -> bool:
    """In another process: what it compiles is in Triton's cache. Returns whether it fits on this GPU."""
    task, tiles, device = work
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    if not fits(task, tiles, 10 * major + minor):
        return False
    calls(task, tiles, 1, 1, device)[0]()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return True


def seconds(run: list[Callable[[], object]], device: torch.device) -> float:
    """Median device time of a call, replayed from a graph of all of them; on a CPU, to try the code, of one round."""
    for call in run:
        call()
    if device.type == "cpu":
        began = time.perf_counter()
        for call in run:
            call()
        return (time.perf_counter() - began) / len(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        alive = [call() for call in run]  # so that none writes into memory that is still in the cache
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(run))
    del alive
    return statistics.median(times[3:])


def measure(task: Task, tried: list[NormTiles], batch: int, device: torch.device) -> tuple[float, list[Timed]]:
    """Seconds of the device copy, and of all that is tried, the rule's first."""
    size = moved(task, batch)
    copies = rotations(size, device)
    pairs = [torch.empty(2, size // 2, dtype=torch.uint8, device=device) for _ in range(copies)]
    copy = seconds([lambda p=p: p[0].copy_(p[1]) for p in pairs], device)
    del pairs
    found = [Timed(seconds(calls(task, t, copies, batch, device), device) / copy, t) for t in tried]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return copy, found


def to_try(task: Task, shared: int) -> tuple[list[NormTiles], list[NormTiles]]:
    """The candidates; and those left out, which kernels/group_norm_launch.py would not let load ahead, as that takes
    more than the `shared` bytes that a program may have."""
    found = list(dict.fromkeys(candidates(task)))
    too_large = [t for t in found if t.ahead and t.shared_bytes(task.images, 2) > shared]
    return [t for t in found if t not in too_large], too_large


def best_everywhere(task: Task, found: list[Timed], pool: Executor) -> Timed:
    """The fastest that no call site and no architecture makes spill; the rule's where none is faster."""
    for timed in sorted(found, key=lambda f: f.ratio):
        if timed == found[0]:
            break
        work = jobs(task, timed.tiles, call_sites(task), aot.ARCHITECTURES)
        if all(aot.sound(row) for row in pool.map(aot.build_one, work)):
            return timed
    return found[0]


def source(chosen: dict[Task, tuple[Timed, Timed]], batch: int, e: dict[str, Any]) -> str:
    """The text of kernels/tuned.py, from the rule's tiles and the best; e is the environment."""
    lines = [
        '"""Tiles of GroupNorm + SiLU for 16-bit x, chosen by measurement in bf16: written by bench/tune_norms.py.',
        "",
        f"On an {e['device']}, torch {e['torch']}, triton {e['triton']}, {e['date']}, batch {batch}. Behind each row:",
        "its time as a multiple of a device copy of the same bytes, and that of the rule in kernels/launch.py. Shapes",
        "that are not here follow the rule.",
        '"""',
        "",
        "# (channels, H * W, groups, backward, dropout): (channels and pixels of a program's tile or chunk, warps,",
        "# NormTiles.ahead)",
        "NORM_TILES: dict[tuple[int, int, int, bool, bool], tuple[int, int, int, int]] = {",
    ]
    for task, (rule, best) in chosen.items():
        if best.ratio < GAIN * rule.ratio:
            t = best.tiles
            value = (t.channels, t.block_hw, t.num_warps, t.ahead)
            lines.append(f"    {task.key}: {value},  # {best.ratio:.2f}, the rule {rule.ratio:.2f}")
    return "\n".join([*lines, "}"]) + "\n"


def told(tiles: NormTiles) -> str:
    """In a few words."""
    return f"{tiles.channels} x {tiles.block_hw}, {tiles.num_warps} warps, ahead {tiles.ahead}"


def tune(task: Task, batch: int, device: torch.device, pool: Executor, most: int | None) -> tuple[Timed, Timed]:
    """Print what is found about a pass; returns the rule's tiles and the best for all its call sites."""
    shared = launch.gpu_limits(device)[1] if device.type == "cuda" else 227 * 1024
    tried, too_large = to_try(task, shared)
    tried = tried[:most]
    fit = pool.map(compile_one, [(task, tiles, device) for tiles in tried])
    fitting = [tiles for tiles, fits_here in zip(tried, fit, strict=True) if fits_here or tiles == task.rule]
    copy, found = measure(task, fitting, batch, device)
    rule, best = found[0], best_everywhere(task, found, pool)
    print(f"{task.label}: copy {copy * 1e6:.1f} us, rule {rule.ratio:.2f} times that; channels x pixels of the best:")
    for timed in sorted(found, key=lambda f: f.ratio)[:3]:
        print(f"    {timed.ratio:.2f}  {told(timed.tiles)}" + ("  chosen" if timed == best else ""))
    for tiles in too_large:
        asked = tiles.shared_bytes(task.images, 2) / 1024
        print(f"    not tried: {told(tiles)}: {asked:.0f} KiB of shared memory, of {shared / 1024:.0f}", flush=True)
    return rule, best


def main(
    write: bool = False,
    out: Path | None = None,
    batch: int = 128,
    processes: int = os.cpu_count() or 1,
    size: Literal["gpu", "tiny"] = "gpu",
) -> int:
    """Time the alternatives for each pass, those first that take most of a step.

    Args:
        write: replace kernels/tuned.py.
        out: write the chosen tiles there.
        batch: images.
        processes: that compile at the same time; 1: only this one.
        size: gpu, or tiny: two alternatives for two passes, on a CPU, only to see that the code runs.
    """
    assert kernels.REGISTRY  # registers the operators
    tiny = size == "tiny"
    device, tasks = torch.device("cpu" if tiny else "cuda"), all_tasks()
    if tiny:
        batch, processes, tasks = 1, 1, tasks[-2:]
    paths = [REPO / "kernels" / "tuned.py"] * write + ([] if out is None else [out])
    e, chosen = environment(device), {}
    with (
        ThreadPoolExecutor(1)
        if processes == 1
        else ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool
    ):
        for task in tasks:
            chosen[task] = tune(task, batch, device, pool, 2 if tiny else None)
            for path in paths:
                write_atomically(path, source(chosen, batch, e).encode())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main)))

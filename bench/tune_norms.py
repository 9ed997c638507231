"""Which tiles are fastest for GroupNorm + SiLU on the GPU at hand.

    python bench/tune_norms.py             # a table: the rule of kernels/launch.py beside the best of its alternatives
    python bench/tune_norms.py --write     # and the best ones into kernels/tuned.py

Shapes and sums are the CIFAR-10 U-Net's. A block's first norm reads a residual, and on the way up a skip connection;
its backward adds the sum's other gradients (two on the way down, where the sum is kept for a skip connection). The
second norm, with dropout, reads x alone. Times are device times of calls over buffers that are not in L2, as multiples
of a device copy of the same bytes. Tiles that spill registers are not tried, nor more resident programs than a
multiprocessor holds. Written tiles spill for no call site with the same key, on no architecture.
"""

import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import kernels
from bench import aot
from bench.timing import rotations
from fastdiff.cli import run_command
from fastdiff.runtime.device import REPO, environment
from kernels import launch
from kernels.group_norm_jobs import CONCATENATIONS, UNET_SHAPES, VARIANTS, norm_jobs
from kernels.launch import NormTiles
from kernels.spec import Job

GROUPS, EPS = 32, 1e-6
DROPPING = ((128, 32), (256, 16), (256, 8), (256, 4))  # second norms of a block: shift and dropout
WIDTHS = {32: (16, 32, 64), 16: (32, 64), 8: (64, 128), 4: (128, 256, 512)}  # channels of a tile, by its height
WARPS_AHEAD = (8, 12, 16, 24)  # of a multiprocessor, where programs stay and load tiles ahead
GAIN = 0.98  # of the rule's time; what gains less is noise


@dataclass(frozen=True)
class Task:
    """One pass over one shape."""

    channels: int
    side: int
    backward: bool
    dropout: bool

    @property
    def key(self) -> tuple[int, int, int, bool, bool]:
        """In NORM_TILES."""
        return self.channels, self.side**2, GROUPS, self.backward, self.dropout

    @property
    def own(self) -> int:
        """Channels of the sum that a skip does not bring."""
        return CONCATENATIONS.get((self.channels, self.side), self.channels)

    @property
    def variant(self) -> str:
        """What a call site switches on, by its name in kernels/group_norm_jobs.py."""
        return "shift+dropout" if self.dropout else "add, kept" if self.own == self.channels else "add"

    @property
    def rule(self) -> NormTiles:
        """What launch.py chooses where nothing is measured."""
        with mock.patch.object(launch, "NORM_TILES", {}):
            return launch.norm_tiles(
                self.channels, self.side**2, GROUPS, itemsize=2, backward=self.backward, dropout=self.dropout
            )

    @property
    def label(self) -> str:
        what = "backward" if self.backward else "forward"
        return f"{self.channels} channels, {self.side}x{self.side}, {self.variant}, {what}"


@dataclass(frozen=True)
class Timed:
    """Tiles, and their time as a multiple of a device copy's."""

    ratio: float
    tiles: NormTiles


TASKS = [Task(c, s, b, False) for c, s in UNET_SHAPES for b in (False, True)]
TASKS += [Task(c, s, b, True) for c, s in DROPPING for b in (False, True)]


def candidates(task: Task) -> Iterator[NormTiles]:
    """The rule's tiles first, then others: whole images that fit in registers, and sweeps over chunks; each without
    and with loading ahead."""
    yield task.rule
    pixels, per_group = task.side**2, task.channels // GROUPS
    for width in WIDTHS[task.side]:
        own = launch._own_channels(task.channels, GROUPS, width)
        block_c = launch.power_of_2(own)
        for warps in (4, 8, 16):
            if 8 <= pixels * block_c / (32 * warps) <= 64:
                yield launch._tiles(own, per_group, pixels, False, warps)
                for ahead in sorted({n // warps for n in WARPS_AHEAD} - {0}):
                    if task.channels // own >= 2 * ahead:  # at batch 128, about two tiles a program and more
                        yield launch._tiles(own, per_group, pixels, False, warps, ahead)
            for held in (8, 16):  # elements a thread of a chunk
                chunk = warps * 32 * held // block_c
                if task.side >= 16 and chunk < pixels and not (task.dropout and held == 16):
                    yield from (launch._tiles(own, per_group, chunk, True, warps, ahead) for ahead in (0, 1))


def moved(task: Task, batch: int) -> int:
    """Bytes of the images that a pass reads and writes."""
    c, element = task.channels, 2 * batch * task.side**2
    if task.dropout:
        return element * (3 * c if task.backward else 2 * c)
    return element * ((5 * c if task.own == c else 4 * c) if task.backward else 3 * c + task.own)


def calls(task: Task, tiles: NormTiles, copies: int, batch: int, device: str = "cuda") -> list[Callable[[], object]]:
    """One call for each set of buffers."""
    ops, c = torch.ops.fastdiff_kernels, task.channels
    weight, bias = (torch.randn(c, device=device) for _ in range(2))
    seed = torch.ones(1, dtype=torch.int64, device=device) if task.dropout else None
    embedding, conv_bias = torch.randn(batch, 1664, device=device).bfloat16(), torch.randn(task.own, device=device)
    shift = embedding[:, -c:] if task.dropout else conv_bias.expand(batch, task.own)

    def image(channels: int) -> Tensor:
        shape = (batch, task.side, task.side, channels)
        return torch.randn(shape, device=device, dtype=torch.bfloat16).permute(0, 3, 1, 2)

    def make() -> Callable[[], object]:
        dy = image(c)
        if task.dropout:
            given = (image(c), weight, bias, shift, None, None, seed)
            if not task.backward:
                return lambda: ops.group_norm_silu(*given, GROUPS, EPS, True, 0.1, 0)
            _, mean, rstd = ops.group_norm_silu(*given, GROUPS, EPS, True, 0.1, 0)
            return lambda: ops.group_norm_silu_backward(dy, *given, mean, rstd, GROUPS, True, 0.1, 0)
        skip = image(c - task.own) if task.own < c else None
        terms = (image(task.own), image(task.own), skip, weight, bias, shift)
        if not task.backward:
            return lambda: ops.add_group_norm_silu(*terms, GROUPS, EPS, True)
        _, u, _, mean, rstd = ops.add_group_norm_silu(*terms, GROUPS, EPS, True)
        du, du2 = image(c), image(c) if task.own == c else None
        return lambda: ops.add_group_norm_silu_backward(
            dy, du, du2, u, weight, bias, shift, mean, rstd, GROUPS, True, task.own
        )

    def with_tiles(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with mock.patch.object(sys.modules["kernels.group_norm_launch"], "norm_tiles", return_value=tiles):
                return call()

        return run

    return [with_tiles(make()) for _ in range(copies)]


def fits(task: Task, tiles: NormTiles, sm: int) -> bool:
    """Whether the kernel for compute capability `sm` keeps to its registers, and as many programs as should stay fit
    on a multiprocessor."""
    ((job, _),) = jobs(task, tiles, (task.variant,), (sm,))
    row = aot.build(job, sm)
    return row.stack == 0 and (tiles.looped or tiles.ahead <= row.programs)


def jobs(task: Task, tiles: NormTiles, variants: Iterable[str], architectures: Iterable[int]) -> list[tuple[Job, int]]:
    """The task's kernel in these tiles, for bench/aot.py to compile."""
    passes = [tuple(norm_jobs(task.channels, task.side, v, groups=GROUPS, tiles=tiles)) for v in variants]
    return [(both[task.backward], sm) for both in passes for sm in architectures]


def call_sites(task: Task) -> list[str]:
    """All that may be switched on in calls that take the tiles of the task's key."""
    return [v for v, on in VARIANTS.items() if ("seed" in on) == task.dropout and "scale" not in on]


def compile_one(work: tuple[Task, NormTiles]) -> bool:
    """In another process: what it compiles is in Triton's cache. Returns whether it fits on this GPU."""
    major, minor = torch.cuda.get_device_capability()
    if not fits(*work, 10 * major + minor):
        return False
    calls(*work, copies=1, batch=1)[0]()
    torch.cuda.synchronize()
    return True


def seconds(run: list[Callable[[], object]]) -> float:
    """Median device time of a call, replayed from a graph of all of them."""
    for call in run:
        call()
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


def measure(task: Task, tried: list[NormTiles], batch: int) -> tuple[float, list[Timed]]:
    """Seconds of the device copy, and of all that is tried, the rule's first."""
    size = moved(task, batch)
    copies = rotations(size, torch.device("cuda"))
    pairs = [torch.empty(2, size // 2, dtype=torch.uint8, device="cuda") for _ in range(copies)]
    copy = seconds([lambda p=p: p[0].copy_(p[1]) for p in pairs])
    del pairs
    found = [Timed(seconds(calls(task, t, copies, batch)) / copy, t) for t in tried]
    torch.cuda.empty_cache()
    return copy, found


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


def main(write: bool = False, batch: int = 128, processes: int = os.cpu_count() or 1) -> int:
    """Time the alternatives for each shape.

    Args:
        write: replace kernels/tuned.py.
        batch: images.
        processes: that compile at the same time.
    """
    assert kernels.REGISTRY  # registers the operators
    console = Console(width=130)
    work = [(task, tiles) for task in TASKS for tiles in dict.fromkeys(candidates(task))]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = track(pool.map(compile_one, work, chunksize=4), "compiling", len(work), console=console)
        fitting = [w for w, fit in zip(work, found, strict=True) if fit or w[1] == w[0].rule]
        results: dict[Task, list[Timed]] = {}
        table = Table("pass", "copy, µs", "rule", "best", "best: channels x pixels, warps, ahead", "second", "third")
        for task in track(TASKS, "timing", console=console):
            copy, results[task] = measure(task, [tiles for other, tiles in fitting if other == task], batch)
            best = sorted(results[task], key=lambda f: f.ratio)[:3]
            cells = [
                f"{f.ratio:.2f}: {f.tiles.channels} x {f.tiles.block_hw}, {f.tiles.num_warps}, {f.tiles.ahead}"
                for f in best
            ]
            rule = f"{results[task][0].ratio:.2f}"
            table.add_row(task.label, f"{copy * 1e6:.1f}", rule, f"{best[0].ratio:.2f}", *cells)
        console.print(table)
        if write:
            chosen = {}
            for task in track(TASKS, "compiling the best for all call sites", console=console):
                chosen[task] = results[task][0], best_everywhere(task, results[task], pool)
            path = REPO / "kernels" / "tuned.py"
            path.write_text(source(chosen, batch, environment(torch.device("cuda"))))
            console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main)))

"""Which tiles are fastest for GroupNorm + SiLU on the GPU at hand: what kernels/launch.py chooses, beside others.

    python bench/tune_norms.py                 # the shapes of the CIFAR-10 U-Net at batch 128; a table, and JSON

Times are the device's own, of calls over buffers that are not in L2, as multiples of a device copy of the same bytes.
"""

import json
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.timing import rotations
from fastdiff.hardware import environment
from kernels import group_norm_silu as op  # noqa: F401  registers the operator
from kernels.launch import NormTiles, norm_tiles, power_of_2

GROUPS, EPS = 32, 1e-6
SHAPES = ((128, 32), (256, 32), (384, 32), (256, 16), (512, 16), (256, 8), (512, 8), (256, 4), (512, 4))
DROPPING = ((128, 32), (256, 16), (256, 8), (256, 4))  # second norms of a block: shift and dropout
WIDTHS = {32: (16, 32, 64), 16: (32, 64, 128), 8: (64, 128, 256), 4: (128, 256, 512)}  # by height


@dataclass(frozen=True)
class Task:
    """One pass over one shape."""

    channels: int
    side: int
    backward: bool
    dropout: bool

    @property
    def chosen(self) -> NormTiles:
        return norm_tiles(self.channels, self.side**2, GROUPS, itemsize=2, backward=self.backward, dropout=self.dropout)

    @property
    def label(self) -> str:
        what = "backward" if self.backward else "forward"
        return f"{self.channels} channels, {self.side}x{self.side}{', shift + dropout' if self.dropout else ''}, {what}"


def candidates(task: Task) -> Iterator[NormTiles]:
    """The chosen tiles first, then others of all widths that are whole groups, at once or in chunks."""
    yield task.chosen
    rows = power_of_2(task.side**2)
    for block_c in WIDTHS[task.side]:
        per_group = task.channels // GROUPS
        unit = math.lcm(per_group, 8)
        own = block_c // unit * unit
        if own == 0 or task.channels % own:
            continue
        base = NormTiles(own, block_c, power_of_2(own // per_group), rows, False, 4)
        for warps in (4, 8, 16):
            elements = rows * block_c / (32 * warps)
            if 8 <= elements <= (32 if task.backward else 64):
                yield replace(base, num_warps=warps)
            for held in (8, 16):  # elements a thread of a chunk
                chunk = warps * 32 * held // block_c
                if task.side >= 16 and warps >= 8 and chunk < rows:
                    yield replace(base, block_hw=chunk, looped=True, num_warps=warps)


def calls(task: Task, tiles: NormTiles, copies: int, batch: int) -> list[Callable[[], object]]:
    """One call for each set of buffers."""
    module = sys.modules["kernels.group_norm_silu"]
    ops = torch.ops.fastdiff_kernels
    made = []
    shape = (batch, task.side, task.side, task.channels)
    weight, bias = torch.ones(task.channels, device="cuda"), torch.zeros(task.channels, device="cuda")
    seed = torch.ones(1, dtype=torch.int64, device="cuda") if task.dropout else None
    shift = torch.randn(shape[0], task.channels, device="cuda").bfloat16() if task.dropout else None
    p = 0.1 if task.dropout else 0.0
    for _ in range(copies):
        x, dy = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2) for _ in range(2))
        tail = (GROUPS, EPS, True, p, 0)
        forward = (x, weight, bias, shift, None, None, seed, *tail)
        if task.backward:
            _, mean, rstd = ops.group_norm_silu(*forward)
            backward = (dy, x, weight, bias, shift, None, None, seed, mean, rstd, GROUPS, True, p, 0)
            made.append(lambda a=backward: ops.group_norm_silu_backward(*a))
        else:
            made.append(lambda a=forward: ops.group_norm_silu(*a))

    def with_tiles(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with mock.patch.object(module, "norm_tiles", return_value=tiles):
                return call()

        return run

    return [with_tiles(call) for call in made]


def compile_one(work: tuple[Task, NormTiles]) -> None:
    """In another process: what it compiles is in Triton's cache."""
    task, tiles = work
    calls(task, tiles, 1, 1)[0]()
    torch.cuda.synchronize()


def seconds(run: list[Callable[[], object]]) -> float:
    """Median device time of a call, replayed from a graph of all of them."""
    for call in run:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        alive = [call() for call in run]  # so that none writes into memory that is still in the cache
    times = []
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(run))
    del alive
    return statistics.median(times[3:])


def main(out: Path = Path("tune_norms.json"), batch: int = 128, processes: int = os.cpu_count() or 1) -> int:
    """Time the candidates of each shape.

    Args:
        out: where the JSON goes.
        batch: images.
        processes: that compile at the same time.
    """
    tasks = [Task(c, s, b, False) for c, s in SHAPES for b in (False, True)]
    tasks += [Task(c, s, b, True) for c, s in DROPPING for b in (False, True)]
    work = [(task, tiles) for task in tasks for tiles in dict.fromkeys(candidates(task))]
    console = Console(width=150)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(track(pool.map(compile_one, work), "compiling", len(work), console=console))
    rows = []
    for task in track(tasks, "timing", console=console):
        elements = batch * task.channels * task.side**2
        moved = elements * (6 if task.backward else 4)
        copies = rotations(moved, torch.device("cuda"))
        pairs = [torch.empty(2, moved // 2, dtype=torch.uint8, device="cuda") for _ in range(copies)]
        copy = seconds([lambda p=p: p[0].copy_(p[1]) for p in pairs])
        del pairs
        timed = [(seconds(calls(task, tiles, copies, batch)) / copy, tiles) for t, tiles in work if t == task]
        rows += [{"task": task.label, "copy_us": copy * 1e6, "ratio": r, **asdict(tiles)} for r, tiles in timed]
        torch.cuda.empty_cache()
    out.write_text(json.dumps({"environment": environment(torch.device("cuda")), "rows": rows}, indent=1) + "\n")
    table = Table("pass", "copy µs", "chosen", "best", "best tiles (channels x pixels, warps)")
    for task in tasks:
        mine = [row for row in rows if row["task"] == task.label]
        best = min(mine, key=lambda row: row["ratio"])
        tiles = f"{best['block_c']} x {best['block_hw']}{' looped' if best['looped'] else ''}, {best['num_warps']}"
        table.add_row(task.label, f"{mine[0]['copy_us']:.0f}", f"{mine[0]['ratio']:.2f}", f"{best['ratio']:.2f}", tiles)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))

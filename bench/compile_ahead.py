"""Fill torch.compile's caches on disk: what benchmarks would compile one after the other is compiled at the same time.

    python bench/compile_ahead.py bench/test_step.py bench/test_sampler.py

In several processes, every comparison of these files is built, and each of its workloads runs once.
"""

import importlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro

from bench.suite import Comparison, make_size
from fastdiff.cli import run_command
from fastdiff.runtime.device import set_backends


def comparisons(file: Path, size: str) -> list[Comparison]:
    """Those of a benchmark's file that compile something."""
    found = importlib.import_module(f"bench.{file.stem}").comparisons(make_size(size))
    return [each for each in found if not each.case.endswith("eager")]


def run_once(work: tuple[Path, str, int]) -> str:
    """Build the i-th comparison of a file and call each workload; returns its case, and the error if there was one."""
    file, size, i = work
    set_backends(make_size(size).device)
    torch.compiler.reset()
    if size == "tiny":
        torch.compiler.set_stance("force_eager")
    comparison = comparisons(file, size)[i]
    try:
        for workload in comparison.build().values():
            workload.run(0)
    except Exception as error:  # of one comparison; who measures it will see it again
        return f"{comparison.case}: {type(error).__name__}: {error}"
    return comparison.case


def main(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    size: str = "gpu",
    processes: int = (os.cpu_count() or 1) // 2,
) -> int:
    """Compile what benchmarks will need.

    Args:
        files: of benchmarks.
        size: as of `pytest bench`: gpu or tiny.
        processes: at the same time, each with several to compile; 0 or 1: only this one.
    """
    work = [(file, size, i) for file in files for i in range(len(comparisons(file, size)))]
    if processes < 2:
        cases = map(run_once, work)
    else:
        cases = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")).map(run_once, work)
    for case in cases:
        print(case, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main)))

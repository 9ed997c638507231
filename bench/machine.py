"""What this machine can do at most; `python bench/machine.py [cuda|cpu]` tells it, and what the machine is, as JSON."""

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro

from bench.timing import Stopwatch, Workload, interleave
from fastdiff.cli import run_command
from fastdiff.runtime.device import environment, resolve_device


def ceilings(device: torch.device, stopwatch: Stopwatch, *, budget: float, scale: int = 1) -> dict[str, float]:
    """Bytes a second of a device copy (read + write), and FLOP a second of a matrix product of random numbers.

    The product is bfloat16 on CUDA and float32 on a CPU. Medians: what the machine holds, not its best moment.

    Args:
        budget: seconds for both.
        scale: divides the sizes, to try the code only.
    """
    cuda = device.type == "cuda"
    n = (2**30 if cuda else 2**28) // scale
    source, target = (torch.ones(n, dtype=torch.uint8, device=device) for _ in range(2))
    side = (8192 if cuda else 1536) // scale
    dtype = torch.bfloat16 if cuda else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    work = {
        "copy": Workload(lambda i: target.copy_(source), bytes=2 * n),
        "matmul": Workload(lambda i: torch.mm(a, b, out=product), flops=2 * side**3),
    }
    times = interleave(work, stopwatch, queued=True, budget=budget)
    return {"bytes_s": 2 * n / times["copy"].median, "flops_s": 2 * side**3 / times["matmul"].median}


def ceilings_apart(device: torch.device, *, budget: float) -> dict[str, float]:
    """`ceilings`, measured in a process of its own, so that its memory does not count as this one's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_ceilings, (device.type, budget))


def _ceilings(device: str, budget: float) -> dict[str, float]:
    where = torch.device(device)
    return ceilings(where, Stopwatch(where), budget=budget)


def main(device: Annotated[str, tyro.conf.Positional] = "auto", /, budget: float = 2.0, scale: int = 1) -> int:
    """Print the environment and the ceilings.

    Args:
        device: auto, cuda or cpu.
        budget: seconds to measure.
        scale: divides the sizes, to try the code only.
    """
    where = resolve_device(device)
    measured = ceilings(where, Stopwatch(where), budget=budget, scale=scale)
    print(json.dumps({"environment": environment(where), "ceilings": measured}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main)))

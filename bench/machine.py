"""What the numbers were measured on, and what this machine can do at most."""

import multiprocessing

import torch

from bench.timing import Stopwatch, Workload, interleave


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

"""Times of repeated calls: interleaved, after warm-up, by CUDA events on a GPU and by perf_counter on a CPU."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

WARM_UP = 5  # calls before any is timed: compilation, cuDNN's choice, allocation; a captured step needs 4
ROW = 20  # calls in a row on a GPU: the host's time hides behind the call before, but at the first
LONG = 1.0  # seconds; a call that takes longer even the second time needs no further warming, and no row
MAX_COPIES = 64  # of rotating buffers


@dataclass(frozen=True)
class Workload:
    """Something to time.

    run     `run(i)` is the i-th call; it picks the (i mod n)-th of its n rotating buffers
    bytes   that any implementation must move in a call
    flops   of a call; 2 to a multiply-add
    images  that a call trains on, samples or loads
    units   what ratios count a call as, e.g. the number of network evaluations in it
    """

    run: Callable[[int], object]
    bytes: float = 0.0
    flops: float = 0.0
    images: float = 0.0
    units: float = 1.0


@dataclass(frozen=True)
class Samples:
    """Seconds a call, one number a round; each is the mean of `calls` calls in a row."""

    seconds: list[float]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low


class Stopwatch:
    """Times `calls` calls in a row, on one device.

    Args:
        device: a CPU or the current CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.count = device, 0
        if device.type == "cuda":
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.hold = 1_000_000  # clock cycles for which the device is kept busy while the host queues calls

    def __call__(self, run: Callable[[int], object], calls: int, *, queued: bool) -> float:
        """Seconds a call.

        Args:
            run: see Workload.
            queued: on CUDA, let the host queue every call before the device starts on them: the device's own time,
                without gaps in which it waits for the host. False times what a user waits for.

        Raises:
            RuntimeError: queued, but `run` waits for the device.
        """
        if self.device.type == "cpu":
            started = time.perf_counter()
            self._call(run, calls)
            return (time.perf_counter() - started) / calls
        for _ in range(6):
            torch.cuda.synchronize()
            if queued:
                torch.cuda._sleep(self.hold)
            self.start.record()
            self._call(run, calls)
            ahead = not self.start.query()  # the device has not even come to the first call
            self.end.record()
            self.end.synchronize()
            if ahead or not queued:
                return self.start.elapsed_time(self.end) / 1e3 / calls
            self.hold *= 4
            calls = max(1, calls // 2)  # the driver's queue may have been full, at about a thousand launches
        self.hold = 1_000_000
        raise RuntimeError("the host cannot queue these calls ahead of the device: one of them waits for it")

    def _call(self, run: Callable[[int], object], calls: int) -> None:
        for _ in range(calls):
            run(self.count)
            self.count += 1


def interleave(
    workloads: Mapping[str, Workload], stopwatch: Stopwatch, *, queued: bool, budget: float, warm_up: int = WARM_UP
) -> dict[str, Samples]:
    """Time all workloads in turn, round after round, so that what slows the machine down meets all of them.

    The first of a round is another one each time.

    Args:
        queued: see Stopwatch.
        warm_up: calls of each before any is timed; on a CPU fewer, once they have taken LONG after the first.
        budget: seconds for the rounds; from 5 (3, where they are so long that 2 would not fit) up to 51 are run.
    """
    shortest = 1e-3 if queued and stopwatch.device.type == "cuda" else 1e-2  # seconds a sample, well above the clock's
    most = 10 if queued and stopwatch.device.type == "cuda" else 1000  # queued calls must fit into the driver's queue
    row = ROW if stopwatch.device.type == "cuda" and not queued else 1
    calls, total = {}, 0.0
    for name, work in workloads.items():
        once = _warm_up(work, stopwatch, warm_up, queued=queued)
        calls[name] = max(min(row, math.ceil(LONG / once)), min(most, math.ceil(shortest / once)))
        total += calls[name] * once
    seconds: dict[str, list[float]] = {name: [] for name in workloads}
    names = list(workloads)
    least = 5 if 2 * total <= budget else 3
    for r in range(max(least, min(51, int(budget / total)))):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(stopwatch(workloads[name].run, calls[name], queued=queued))
    return {name: Samples(seconds[name], calls[name]) for name in names}


def _warm_up(work: Workload, stopwatch: Stopwatch, calls: int, *, queued: bool) -> float:
    """Call it until it is warm; returns about how many seconds a call takes."""
    spent = 0.0
    for i in range(calls):
        seconds = stopwatch(work.run, 1, queued=False)
        spent += seconds if i > 0 else 0.0  # the first compiles
        if seconds > LONG and i > 0:
            return seconds
        if spent > LONG and stopwatch.device.type == "cpu":
            break
    return min(stopwatch(work.run, 1, queued=queued) for _ in range(2))


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 of a GPU, else the CPU's largest (32 MiB if unknown)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(s.read_text().strip().removesuffix("K")) * 1024 for s in sizes), default=32 * 2**20)


def rotations(bytes_a_call: float, device: torch.device) -> int:
    """How many sets of buffers to go round, so that one is out of the cache when its turn comes again."""
    return max(2, min(MAX_COPIES, math.ceil(2 * cache_bytes(device) / max(bytes_a_call, 1)) + 1))

"""Records steps of a running loop with torch.profiler, and reports where their time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from fastdiff.errors import UserError
from fastdiff.reporting.profile_report import write_report
from fastdiff.reporting.profiling import DRAIN, analyse, read_trace
from fastdiff.runtime.device import environment, memory_peak

LEAD = 10  # steps before anything is timed: compilation, autotuning, allocations


def steps_needed(steps: int) -> int:
    """Steps from the first that is timed to the last that is recorded: `steps` plain ones, a warm-up, `steps` more."""
    return 2 * steps + 1


def choose_begin(*, start: int, last: int | None, steps: int, pauses: Sequence[int]) -> int:
    """The step after which to begin, so that the measured steps hold only training and its logging.

    It aims at the middle of what remains, or at LEAD steps after the start if the run has no end. If a pause lies
    there, it takes the next place without one, else the nearest before.

    Args:
        start: steps taken before this process.
        last: the last step, or None.
        steps: to be recorded.
        pauses: intervals, in steps, at which a checkpoint or an evaluation interrupts the run.

    Raises:
        UserError: there is no such place.
    """
    need, first = steps_needed(steps), start + LEAD
    if last is not None and first + need > last:
        raise UserError(
            f"--profile {steps} needs {LEAD + need} steps ({LEAD} to warm up, {steps} timed, 1 to start the profiler, "
            f"{steps} recorded), but --steps leaves {max(last - start, 0)}; raise it, or lower --profile."
        )
    middle = first if last is None else max(first, (start + last - need) // 2)
    latest = middle + max(pauses) if last is None else last - need
    for begin in chain(range(middle, latest + 1), range(middle - 1, first - 1, -1)):
        # A pause after step `begin` would be timed, one after the last recorded step not.
        if all((begin + need - 1) // every == (begin - 1) // every for every in pauses):
            return begin
    raise UserError(
        f"--profile {steps} needs {need} steps between two checkpoints or evaluations; lower it, or raise --save-every "
        "and --eval-every."
    )


def record_run(
    directory: Path, *, steps: int, start: int, last: int | None, pauses: Sequence[int], device: torch.device,
    title: str, facts: Mapping[str, str], say: Callable[[str], None], settle: Callable[[], object],
) -> StepRecorder | nullcontext[None]:  # fmt: skip
    """A recorder of `steps` steps of a run; nothing for 0 steps, or if a resumed run already has its profile.

    For the arguments see `choose_begin` and `StepRecorder`. Raises UserError if the steps do not fit into the run.
    """
    if steps == 0:
        return nullcontext()
    if (directory / "summary.md").exists():
        say(f"profile    is in {directory}; remove it to record another")
        return nullcontext()
    begin = choose_begin(start=start, last=last, steps=steps, pauses=pauses)
    first = begin + steps + 2  # after those that are timed, and one in which the profiler starts
    recorded = f"steps {first:,} to {first + steps - 1:,}"
    say(f"profile    {recorded} into {directory}")
    facts = {**facts, "recorded": recorded}
    return StepRecorder(directory, steps=steps, begin=begin, device=device, title=title, facts=facts, settle=settle)


class StepRecorder:
    """Times `steps` steps, then records as many, and writes trace.json.gz, summary.md and time.png.

    Use it as a context manager around the loop, and call `after_step` at the end of each step. It does not touch what
    the steps compute, and waits for the device at four places only.

    Args:
        directory: for the three files.
        steps: how many to time, and to record, at least 1.
        begin: after which step to start.
        title: of the report.
        facts: lines of the report beside those about the machine.
        settle: called before the first timed step, to wait for work in the background.
    """

    def __init__(
        self, directory: Path, *, steps: int, begin: int, device: torch.device, title: str, facts: Mapping[str, str],
        settle: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self.directory, self.steps, self.begin, self.device = directory, steps, begin, device
        self.title, self.facts, self.settle = title, facts, settle
        self.plain_step, self.clock = 0.0, 0.0  # milliseconds; seconds
        self.profiler: profile | None = None

    def __enter__(self) -> StepRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.profiler is not None:  # the loop ended in the middle: nothing is written
            self.profiler.stop()
            self.profiler = None

    def after_step(self, step: int) -> float:
        """Note that `step` steps have been taken; returns the seconds that were spent on the profiler, not on a step.

        The files are written in the call after step begin + 2 steps + 1.
        """
        done, entered = step - self.begin, time.perf_counter()
        if done < 0 or done > steps_needed(self.steps):
            return 0.0
        if done == 0:
            self.settle()
            self._wait()
            entered = self.clock = time.perf_counter()  # until here the device was still training
        elif done == self.steps:
            self._wait()
            self.plain_step = 1e3 * (time.perf_counter() - self.clock) / self.steps
            entered = time.perf_counter()
            self.profiler = self._start()
        elif done > self.steps and self.profiler is not None:
            last = done == steps_needed(self.steps)
            if last or done == self.steps + 1:
                with record_function(DRAIN):
                    self._wait()
            entered = time.perf_counter()
            self.profiler.step()
            if last:
                self._finish(self.profiler)
        return time.perf_counter() - entered

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _start(self) -> profile:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        plan = schedule(wait=0, warmup=1, active=self.steps, repeat=1)
        profiler = profile(activities=activities, schedule=plan, record_shapes=True, profile_memory=True)
        profiler.start()
        return profiler

    def _finish(self, profiler: profile) -> None:
        self.profiler = None
        profiler.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        trace = self.directory / "trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        write_report(
            self.directory, analyse(read_trace(trace)), title=self.title, plain_step=self.plain_step,
            facts={**{k: str(v) for k, v in environment(self.device).items() if v is not None}, **self.facts},
            memory=memory_peak(self.device),
        )  # fmt: skip

"""SIGTERM and SIGINT at random moments: a checkpoint at the next step's end, the shell's exit code, and a resume."""

import signal
import time

from fastdiff.runs import checkpoint
from tests.reliability import jobs
from tests.reliability.conftest import counts
from tests.reliability.jobs import rows, saved

TIMES = {
    "data": 12,
    "step": 12,
    "accumulating": 24,
    "saving": 20,
    "sampling": 4,
    "evaluating": 2,
}  # phase -> how often a run is in it


@counts(fast=6, slow=50)
def test_the_first_signal_saves(tiny_config, tmp_path, promise, count):
    log, changes = tmp_path / "log", {"steps": 12, "save_every": 5, "eval_every": 6, "accumulate": 2}
    assert jobs.finish(jobs.start(jobs.train_run, tiny_config("whole", **changes), log=log)) == 0, log.read_text()
    text = (
        "Signals: a checkpoint at the next step's end, exit 143 or 130 within 15 s, and the resumed run is the unbroken"
    )
    with promise(text, "signals") as p:
        for index in range(count):
            phase, number = list(TIMES)[index % 6], (signal.SIGTERM, signal.SIGINT)[index // 2 % 2]
            nth = jobs.random_source("signal", index).randint(1, TIMES[phase])
            config, sent = tiny_config(f"run-{index}", **changes), tmp_path / f"sent-{index}"
            run = tmp_path / f"run-{index}" / "1"
            with p.case(f"{number.name}, {phase} {nth}"):
                hook = (jobs.in_phase, phase, nth, jobs.signal_myself, number, sent)
                assert jobs.finish(jobs.start(jobs.train_run, config, None, hook, log=log)) == 128 + number
                assert time.time() - float(sent.read_text()) < 15
                found = checkpoint.load_latest(run / "checkpoints")
                assert found is not None
                assert found.skipped == []
                if phase in ("data", "step"):
                    assert found.step == nth
                if phase == "accumulating":  # the step is finished, and none is begun after it
                    assert found.step == (nth + 1) // 2
                assert jobs.finish(jobs.start(jobs.train_run, config, run, log=log)) == 0, log.read_text()[-2000:]
                assert jobs.same_state(saved(run), saved(tmp_path / "whole" / "1"))
                assert rows(run) == rows(tmp_path / "whole" / "1")


@counts(fast=2, slow=20)
def test_the_second_signal_leaves_at_once(tiny_config, tmp_path, promise, count):
    """Also where the main thread is in a long call into C, so that Python runs no handler."""
    with promise("Signals: the second one exits within 2 s, and no file is corrupt", "signals") as p:
        for index in range(count):
            phase = ("step", "saving")[index % 2]
            random = jobs.random_source("second", index)
            nth = 4 + random.randint(1, 4)  # for saving: in the checkpoint after the first one
            config, log, begun = (
                tiny_config(f"run-{index}", save_every=2),
                tmp_path / f"log-{index}",
                tmp_path / f"b{index}",
            )
            with p.case(f"{phase} {nth}"):
                hook = (jobs.in_phase, phase, nth, jobs.busy_in_c, begun)
                process = jobs.start(jobs.train_run, config, None, hook, log=log)
                jobs.wait_for(begun.exists)
                first, second = random.choices((signal.SIGTERM, signal.SIGINT), k=2)
                jobs.os.kill(process.pid, first)
                jobs.wait_for(lambda log=log: "finishing this step" in log.read_text())
                began = time.monotonic()
                jobs.os.kill(process.pid, second)
                assert jobs.finish(process, 20) == 128 + second
                assert time.monotonic() - began < 2
                found = checkpoint.load_latest(tmp_path / f"run-{index}" / "1" / "checkpoints")
                assert found is not None
                assert found.skipped == []

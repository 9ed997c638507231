"""A run that is stopped and goes on in a new process is the unbroken one, bit for bit."""

import pytest

from fastdiff.runs import checkpoint
from tests.reliability import jobs
from tests.reliability.conftest import counts

EDGES = (6, 7, 25)  # the 7th batch of 8 ends the first epoch of 50 images; the 25th ends the fourth, and itself
STEPS = 36


@counts(fast=4, slow=20)
def test_a_resumed_run_is_the_unbroken_one(tiny_config, tmp_path, promise, count):
    log = tmp_path / "log"
    changes = {"steps": STEPS, "accumulate": 2}
    whole_config = tiny_config("whole", **changes)
    assert jobs.finish(jobs.start(jobs.train_run, whole_config, log=log)) == 0, log.read_text()
    whole = tmp_path / "whole" / "1"
    random = jobs.random_source("resume")
    stops = [*EDGES, *random.sample([s for s in range(1, 26) if s not in EDGES], count - len(EDGES))]
    with promise("Exact resume: weights, averages, optimizer, histories and the next losses bit-equal", "stops") as p:
        for stop in stops:
            config = tiny_config(f"stopped-{stop}", **changes)
            run = tmp_path / f"stopped-{stop}" / "1"
            with p.case(f"stop after step {stop}"):
                process = jobs.start(jobs.train_run, config, None, (jobs.stop_after, stop), log=log)
                assert jobs.finish(process) == 143, log.read_text()
                assert checkpoint.load_latest(run / "checkpoints").step == stop
                assert jobs.finish(jobs.start(jobs.train_run, config, run, log=log)) == 0, log.read_text()
                assert jobs.same_state(jobs.saved(run), jobs.saved(whole))
                assert jobs.rows(run) == jobs.rows(whole)
                assert len(jobs.rows(run)) == STEPS


@pytest.mark.gpu
def test_on_a_gpu_deterministic_runs_resume_bit_for_bit(tiny_config, tmp_path, promise):
    """Compiled, fused and captured, as runs are there by default; all at once, as compilation takes the time."""
    stops = (2, 7, 13)  # before the capture, at the end of an epoch, in the middle
    options = {"device": "cuda", "loader": "resident", "deterministic": True}
    logs = {name: tmp_path / f"log-{name}" for name in ("whole", *stops)}

    def run_all(arguments):
        processes = {name: jobs.start(jobs.train_run, *given, log=logs[name]) for name, given in arguments.items()}
        return {name: jobs.finish(process) for name, process in processes.items()}

    configs = {name: tiny_config(f"run-{name}", **options) for name in logs}
    runs = {name: tmp_path / f"run-{name}" / "1" for name in logs}
    first = {name: (configs[name], None, (jobs.stop_after, name)) for name in stops}
    ended = run_all({"whole": (configs["whole"],), **first})
    assert ended == {"whole": 0, **dict.fromkeys(stops, 143)}, "".join(log.read_text() for log in logs.values())
    assert [checkpoint.load_latest(runs[stop] / "checkpoints").step for stop in stops] == list(stops)
    resumed = run_all({stop: (configs[stop], runs[stop]) for stop in stops})
    assert resumed == dict.fromkeys(stops, 0), "".join(log.read_text() for log in logs.values())
    with promise("Exact resume on a GPU with --deterministic", "stops") as p:
        for stop in stops:
            with p.case(f"stop after step {stop}"):
                assert jobs.same_state(jobs.saved(runs[stop]), jobs.saved(runs["whole"]))
                assert jobs.rows(runs[stop]) == jobs.rows(runs["whole"])

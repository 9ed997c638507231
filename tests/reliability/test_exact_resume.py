"""A run that is stopped and goes on in a new process is the unbroken one, bit for bit (on a CPU)."""

from fastdiff.training import checkpoint
from tests.reliability import jobs
from tests.reliability.conftest import counts

EDGES = (6, 7)  # the 7th batch of 8 ends the first epoch of 50 images


@counts(fast=3, slow=20)
def test_a_resumed_run_is_the_unbroken_one(tiny_config, tmp_path, promise, count):
    log = tmp_path / "log"
    assert jobs.finish(jobs.start(jobs.train_run, tiny_config("whole"), log=log)) == 0, log.read_text()
    whole = tmp_path / "whole" / "1"
    random = jobs.random_source("resume")
    stops = [*EDGES, *random.sample([s for s in range(1, 20) if s not in EDGES] + [21], count - len(EDGES))]
    with promise("Exact resume: weights, averages, optimizer, histories and the next losses bit-equal", "stops") as p:
        for stop in stops:
            config = tiny_config(f"stopped-{stop}")
            run = tmp_path / f"stopped-{stop}" / "1"
            with p.case(f"stop after step {stop}"):
                process = jobs.start(jobs.train_run, config, None, (jobs.stop_after, stop), log=log)
                assert jobs.finish(process) == 143, log.read_text()
                assert checkpoint.load_latest(run / "checkpoints").step == stop
                assert jobs.finish(jobs.start(jobs.train_run, config, run, log=log)) == 0, log.read_text()
                assert jobs.same_state(jobs.saved(run), jobs.saved(whole))
                assert jobs.rows(run) == jobs.rows(whole)
                assert len(jobs.rows(run)) == 30

"""NaN and Inf in the input, weights, gradient or loss of a step: the run stops, and nothing bad is saved."""

import json
import math
import re

import pytest

from fastdiff.data.loaders import batch_plan
from fastdiff.runs import checkpoint
from tests.reliability import jobs
from tests.reliability.conftest import counts


@counts(fast=4, slow=30)
def test_no_poisoned_weights_are_saved(tiny_config, tmp_path, promise, count):
    text = "Non-finite numbers: the run stops, the last good checkpoint is named, 0 poisoned ones saved"
    with promise(text, "injections") as p:
        for index in range(count):
            random = jobs.random_source("poison", index)
            where, value = ("input", "weights", "gradient", "loss")[index % 4], random.choice([math.nan, math.inf])
            bad, save_every = random.randrange(5, 25), random.choice([1, 3, 5])
            config = tiny_config(f"run-{index}", save_every=save_every, log_every=7, keep_last=100)
            log, run = tmp_path / f"log-{index}", tmp_path / f"run-{index}" / "1"
            with p.case(f"{value} in the {where} of step {bad + 1}, saving every {save_every}"):
                hook = (jobs.poison, where, [bad], value)
                assert jobs.finish(jobs.start(jobs.train_run, config, None, hook, log=log)) == 1, log.read_text()[
                    -2000:
                ]
                named = re.search(
                    rf"step {bad + 1} is not finite; .*last good checkpoint is (\S+step-\d+)", log.read_text()
                )
                assert named, log.read_text()[-2000:]
                found = checkpoint.load_latest(run / "checkpoints")
                assert str(found.path) == named[1]
                dump = json.loads((run / f"non-finite-step-{bad + 1}.json").read_text())
                indices, _ = batch_plan(50, batch_size=8, seed=0, step=bad)
                assert dump["indices"] == indices.tolist()
                assert len(dump["t"]) == 8
                assert found.step == bad // save_every * save_every
                for path in checkpoint.list_checkpoints(run / "checkpoints"):
                    state = checkpoint.load(path).state
                    assert all(t.isfinite().all() for t in checkpoint.tensors(state))


def test_an_update_that_overflows_is_not_saved(tiny_config, tmp_path):
    """All losses and gradients so far are finite; only the weights that the last step made are not."""
    config, log = tiny_config(save_every=10, log_every=10), tmp_path / "log"
    hook = (jobs.after_update, 9, math.inf)
    assert jobs.finish(jobs.start(jobs.train_run, config, None, hook, log=log)) == 1
    assert "a weight, average or moment is not finite at step 10, which is not saved" in log.read_text()
    assert checkpoint.list_checkpoints(tmp_path / "working" / "1" / "checkpoints") == []


@pytest.mark.parametrize("kernels", ["torch", "triton"])  # on a CPU triton's update is its reference
def test_bad_steps_are_skipped_and_counted(tiny_config, tmp_path, kernels):
    config = tiny_config(kernels=kernels, skip_nonfinite=2, steps=16, save_every=1, log_every=4, keep_last=100)
    log, run = tmp_path / "log", tmp_path / "working" / "1"
    hook = (jobs.poison, "gradient", [5, 6, 9], math.nan)
    assert jobs.finish(jobs.start(jobs.train_run, config, None, hook, log=log)) == 0, log.read_text()[-2000:]
    states = {s: checkpoint.load(run / "checkpoints" / f"step-{s}").state for s in (5, 6, 7, 8)}
    for part in ("model", "ema", "optimizer"):
        assert jobs.same_state(states[5][part], states[6][part])
        assert jobs.same_state(states[5][part], states[7][part])
        assert not jobs.same_state(states[5][part], states[8][part])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 2, 1, 0]
    assert all(row["loss"] is not None and row["grad_norm"] is not None for row in rows)


def test_one_more_in_a_row_stops_the_run_also_across_a_resume(tiny_config, tmp_path):
    config = tiny_config(skip_nonfinite=2, save_every=1, log_every=4)
    log, run = tmp_path / "log", tmp_path / "working" / "1"
    hook = (jobs.poison, "loss", [5, 6], math.inf)
    whole = config.replace(steps=7)
    assert jobs.finish(jobs.start(jobs.train_run, whole, None, hook, log=log)) == 0, log.read_text()[-2000:]
    hook = (jobs.poison, "loss", [7], math.nan)
    assert jobs.finish(jobs.start(jobs.train_run, config, run, hook, log=log)) == 1, log.read_text()[-2000:]
    assert "the loss or the gradient of step 8 is not finite" in log.read_text()
    assert checkpoint.load_latest(run / "checkpoints").step == 7

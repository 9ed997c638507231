import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff.training.train as train_module
from fastdiff.errors import TrainingFailed, UserError
from fastdiff.training import checkpoint
from fastdiff.training.step import TrainStep
from fastdiff.training.train import train

GOLDEN = Path(__file__).with_name("golden_losses.json")


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def assert_same_run(one, other):
    """Weights, averages, optimizer state and metrics are equal, bit for bit."""
    a, b = (checkpoint.load_latest(run / "checkpoints") for run in (one, other))
    assert a.step == b.step
    for part in ("model", "ema"):
        assert a.state[part].keys() == b.state[part].keys()
        assert all(torch.equal(a.state[part][name], b.state[part][name]) for name in a.state[part])
    flat_a, flat_b = ([*s.state["optimizer"]["state"].items()] for s in (a, b))
    assert len(flat_a) == len(flat_b) > 0
    for (index, mine), (other_index, theirs) in zip(flat_a, flat_b, strict=True):
        assert index == other_index
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert a.state["loss_history"] == b.state["loss_history"]
    assert a.state["metrics"] == b.state["metrics"]
    assert rows_of(one) == rows_of(other)


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal while it takes its step-th step."""
    real = TrainStep.__call__

    def call(self, images, index):
        real(self, images, index)
        if index + 1 == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TrainStep, "__call__", call)


def test_a_run_leaves_what_it_promises(tiny_config, tmp_path, capsys):
    assert train(tiny_config()) == 0
    run = tmp_path / "working" / "1"
    assert {p.name for p in run.iterdir()} >= {"config.json", "metrics.jsonl", "metrics.csv", "checkpoints", "saves"}
    assert [p.name for p in checkpoint.list_checkpoints(run / "checkpoints")] == ["step-10", "step-20", "step-30"]
    saves = {p.name for p in (run / "saves").iterdir()}
    assert saves >= {
        "loss.png", "throughput.png", "forward-noising.png", "samples-00000030.png", "trajectory-00000030.png",
    }  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    for row in rows:
        assert row.keys() >= {"step", "images", "loss", "grad_norm", "lr", "images_per_second", "seconds"}
        assert row["images"] == row["step"] * 8
        assert row["images_per_second"] > 0
    assert rows[0]["lr"] == 1e-3
    state = checkpoint.load_latest(run / "checkpoints").state
    assert state.keys() >= {"model", "ema", "optimizer", "loss_history", "fid_history", "best", "config"}
    assert [step for step, _ in state["loss_history"]] == [10, 20, 30]
    out = capsys.readouterr().out
    for part in ("device", "precision", "loader", "kernels", "parameters", str(run)):
        assert part in out
    assert f"look at {run}" in out.splitlines()[-1]


@pytest.mark.parametrize("stop", [1, 6, 7, 13, 20])  # the 7th step holds the edge of the first epoch
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tiny_config, tmp_path, monkeypatch, stop):
    whole = tiny_config(run_root=str(tmp_path / "whole"))
    assert train(whole) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        assert train(tiny_config()) == 128 + signal.SIGTERM
    run = tmp_path / "working" / "1"
    assert checkpoint.load_latest(run / "checkpoints").step == stop
    torch.manual_seed(999)  # the resumed run must not depend on what is left in this process
    assert train(tiny_config(), resume=run) == 0
    assert_same_run(tmp_path / "whole" / "1", run)


def test_resuming_in_new_processes_is_bit_equal_too(tiny_config, tmp_path, train_in_new_process):
    assert train(tiny_config(run_root=str(tmp_path / "whole"))) == 0
    train_in_new_process(tiny_config(steps=13))
    run = tmp_path / "working" / "1"
    done = train_in_new_process(tiny_config(), "--resume", str(run))
    assert "step 20/30" in done.stdout
    assert_same_run(tmp_path / "whole" / "1", run)


def test_rows_after_the_checkpoint_are_written_again_once(tiny_config, tmp_path):
    train(tiny_config())
    run = tmp_path / "working" / "1"
    expected = rows_of(run)
    (run / "checkpoints" / "step-30" / "model.safetensors").write_bytes(b"damaged")
    assert train(tiny_config(), resume=run) == 0
    assert rows_of(run) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(tiny_config, tmp_path, monkeypatch, capsys, number):
    stop_at(monkeypatch, 4, number)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert train(tiny_config()) == 128 + number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    run = tmp_path / "working" / "1"
    assert checkpoint.load_latest(run / "checkpoints").step == 4
    assert (
        f"stopped by {number.name} at step 4; resume with: python train_cifar.py --resume {run}"
        in capsys.readouterr().out
    )


def test_a_signal_during_an_evaluation_breaks_it_off(tiny_config, tmp_path, monkeypatch):
    real = train_module.evaluate

    def evaluate(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(train_module, "evaluate", evaluate)
    assert train(tiny_config(eval_every=10)) == 130
    run = tmp_path / "working" / "1"
    assert checkpoint.load_latest(run / "checkpoints").step == 10
    assert not list((run / "saves").glob("samples-*"))
    monkeypatch.setattr(train_module, "evaluate", real)
    assert train(tiny_config(eval_every=10), resume=run) == 0
    assert sorted(p.name for p in (run / "saves").glob("samples-*")) == [
        f"samples-000000{step}.png" for step in (10, 20, 30)
    ]


def test_a_damaged_newest_checkpoint_never_costs_the_good_ones(tiny_config, tmp_path):
    train(tiny_config(steps=20))
    run = tmp_path / "working" / "1"
    (run / "checkpoints" / "step-20" / "model.safetensors").write_bytes(b"damaged")
    train(tiny_config(steps=15, keep_last=1), resume=run)
    assert checkpoint.load_latest(run / "checkpoints").step == 15


def test_resuming_on_other_images_is_refused(tiny_config, tmp_path):
    train(tiny_config(steps=10))
    np.savez(tmp_path / "images.npz", images=np.zeros((50, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(UserError, match="holds other images"):
        train(tiny_config(), resume=tmp_path / "working" / "1")


def test_the_last_steps_of_a_run_are_logged_too(tiny_config, tmp_path):
    train(tiny_config(steps=4))
    run = tmp_path / "working" / "1"
    assert [row["step"] for row in rows_of(run)] == [4]
    assert (run / "saves" / "loss.png").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tiny_config, tmp_path, monkeypatch):
    real = TrainStep.__call__

    def call(self, images, index):
        if index == 14:
            with torch.no_grad():
                self.parameters[3].fill_(float("inf"))
        real(self, images, index)

    monkeypatch.setattr(TrainStep, "__call__", call)
    with pytest.raises(TrainingFailed, match=r"step 15 is not finite; .* last good checkpoint is .*step-10"):
        train(tiny_config())
    saved = checkpoint.load_latest(tmp_path / "working" / "1" / "checkpoints")
    assert saved.step == 10
    assert all(value.isfinite().all() for value in saved.state["model"].values())


def test_resuming_may_not_change_what_is_trained(tiny_config, tmp_path):
    train(tiny_config(steps=10))
    run = tmp_path / "working" / "1"
    changed = tiny_config(lr=2e-3, net=dataclasses.replace(tiny_config().net, dropout=0.2))
    with pytest.raises(UserError, match=r"--lr was 0\.001, now 0\.002; --dropout was 0\.1, now 0\.2"):
        train(changed, resume=run)
    assert train(tiny_config(steps=12, log_every=1), resume=run) == 0
    assert checkpoint.load_latest(run / "checkpoints").step == 12
    assert json.loads((run / "config.json").read_text())["steps"] == 12


def test_bad_starts_leave_no_run_directory(tiny_config, tmp_path):
    for bad in (
        tiny_config(data=str(tmp_path / "missing")),
        tiny_config(features="efficientnet_lite0", feature_size=1),
        tiny_config(data="digits", split="test"),
    ):
        with pytest.raises(UserError):
            train(bad)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device is 'cuda'"):
            train(tiny_config(device="cuda"))
    assert not (tmp_path / "working").exists()
    with pytest.raises(UserError):
        train(tiny_config(), resume=tmp_path / "nothing")


def test_the_best_checkpoint_is_kept(tiny_config, tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])

    class FakeDistance:
        metric, reference = "fd_fake", "tiny"

    def evaluate(*arguments, keep, **options):
        row = {"sampler": "ddim", "sampler_steps": 2, "eta": 0.0, "metric": "fd_fake", "value": next(values),
               "samples": 4, "features": "fake", "feature_size": 8, "reference": "tiny", "seconds": 0.1}  # fmt: skip
        return row, torch.zeros(keep, 8, 8, 3, dtype=torch.uint8).numpy()

    monkeypatch.setattr(train_module, "evaluate", evaluate)
    monkeypatch.setattr(train_module, "make_extractor", lambda *a, **k: None)
    monkeypatch.setattr(train_module, "FrechetDistance", lambda *a, **k: FakeDistance())
    train(tiny_config(eval_every=5, keep_last=2, features="auto"))
    run = tmp_path / "working" / "1"
    assert [p.name for p in checkpoint.list_checkpoints(run / "checkpoints")] == ["step-10", "step-25", "step-30"]
    state = checkpoint.load_latest(run / "checkpoints").state
    assert (state["best"]["step"], state["best"]["metric"], state["best"]["value"]) == (10, "fd_fake", 1.0)
    assert [row["value"] for row in state["fid_history"]] == [3.0, 1.0, 2.0, 4.0, 5.0, 6.0]
    assert (run / "saves" / "fid.png").exists()


def test_the_dali_loader_trains_the_same(tiny_config, tmp_path):
    for loader in ("resident", "dali"):
        train(tiny_config(steps=10, loader=loader, run_root=str(tmp_path / loader)))
    assert_same_run(tmp_path / "resident" / "1", tmp_path / "dali" / "1")


def test_the_golden_curve(tiny_config, tmp_path, train_in_new_process):
    """20 losses on a CPU: bit-equal in a fresh process, and equal to the recorded ones up to another CPU's rounding."""
    config = tiny_config(steps=20, log_every=1)
    train(config)
    here = [row["loss"] for row in rows_of(tmp_path / "working" / "1")]
    train_in_new_process(config)
    assert [row["loss"] for row in rows_of(tmp_path / "working" / "2")] == here
    assert here == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)

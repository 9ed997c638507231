import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff.evaluation.evaluator as evaluator_module
import fastdiff.training.train as train_module
from fastdiff.errors import TrainingFailed, UserError
from fastdiff.reporting import pictures, plots
from fastdiff.runs import checkpoint
from fastdiff.training import parts
from fastdiff.training.metrics import Metrics
from fastdiff.training.step import TrainStep
from fastdiff.training.train import train
from tests.training.runs import assert_same_run, rows_of, stop_at

GOLDEN = Path(__file__).with_name("golden_losses.json")
DRAWN = {  # tests whose runs draw their pictures
    "test_a_run_leaves_what_it_promises", "test_the_images_that_dissolve_are_of_the_whole_set",
    "test_the_last_steps_of_a_run_are_logged_too", "test_few_steps_are_measured_beside_the_main_row",
    "test_fixed_buffers_train_the_same",
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_pictures(request):
    if request.function.__name__ not in DRAWN:
        request.getfixturevalue("no_pictures")


def test_a_run_leaves_what_it_promises(tiny_config, tmp_path, capsys):
    assert train(tiny_config()) == 0
    run = tmp_path / "working" / "1"
    assert {p.name for p in run.iterdir()} >= {"config.json", "metrics.jsonl", "metrics.csv", "checkpoints", "saves"}
    assert [p.name for p in checkpoint.list_checkpoints(run / "checkpoints")] == ["step-10", "step-20", "step-30"]
    saves = {p.name for p in (run / "saves").iterdir()}
    assert saves >= {
        "loss.png", "loss-by-noise.png", "throughput.png", "forward-noising.png",
        "samples-00000030.png", "trajectory-00000030.png",
    }  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    for row in rows:
        assert row.keys() >= {"step", "images", "loss", "grad_norm", "lr", "images_per_second", "seconds"}
        assert row["images"] == row["step"] * 8
        assert row["images_per_second"] > 0
    assert rows[0]["lr"] == 1e-3
    noise_rows = [json.loads(line) for line in (run / "loss-by-noise.jsonl").read_text().splitlines()]
    assert [(row["step"], sum(row["images"])) for row in noise_rows] == [(10, 80), (20, 80), (30, 80)]
    for row, noise_row in zip(rows, noise_rows, strict=True):  # the same losses, once over steps, once over levels
        total = sum(loss * n for loss, n in zip(noise_row["loss"], noise_row["images"], strict=True) if n)
        assert total / 80 == pytest.approx(row["loss"], rel=1e-5)
    state = checkpoint.load_latest(run / "checkpoints").state
    assert state.keys() >= {"model", "ema", "optimizer", "loss_history", "fid_history", "best", "config"}
    assert [step for step, _ in state["loss_history"]] == [10, 20, 30]
    out = capsys.readouterr().out
    assert "\ndata       images-train: 50 images of 8x8; split train: all of it; pixels " in out
    for part in ("device", "precision", "TF32", "compile", "graphs", "loader", "kernels", "parameters", str(run)):
        assert part in out
    assert f"look at {run}" in out.splitlines()[-1]


def test_the_images_that_dissolve_are_of_the_whole_set(tiny_config, tmp_path, monkeypatch):
    """And not the first ones, which are of one class where a folder holds several."""
    images = np.arange(50, dtype=np.uint8).repeat(8 * 8 * 3).reshape(50, 8, 8, 3)
    np.savez(tmp_path / "images.npz", images=images)
    shown = []
    monkeypatch.setattr(pictures, "save_labelled", lambda groups, title, *_: shown.append((title, groups[:, 0, 0])))
    for seed in (0, 0, 1):
        train(tiny_config(steps=1, seed=seed))
    numbers = [rows.mean((1, 2, 3)).tolist() for title, rows in shown if title.startswith("Forward")]
    assert numbers[0] == numbers[1] != numbers[2]
    assert len(set(numbers[0])) == 4
    assert max(numbers[0]) > 10


@pytest.mark.parametrize(
    ("changes", "warns"), [({}, True), ({"timesteps": 1000}, False), ({"schedule": "cosine"}, False)]
)
def test_a_schedule_that_does_not_end_in_noise_is_told_at_the_start(tiny_config, capsys, changes, warns):
    train(tiny_config(steps=1, **changes))
    out = " ".join(capsys.readouterr().out.split())
    assert ("warning ddpm-linear with T = 100 does not end in noise: x_T keeps 0.6 of the image" in out) == warns


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


def test_a_stopped_run_of_an_installed_fastdiff_names_its_command(tiny_config, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/environment/bin/fastdiff-train"])
    stop_at(monkeypatch, 1)
    assert train(tiny_config()) == 143
    assert "resume with: fastdiff-train --resume " in capsys.readouterr().out


def test_a_signal_during_an_evaluation_breaks_it_off(tiny_config, tmp_path, monkeypatch):
    real = evaluator_module.evaluate

    def evaluate(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(evaluator_module, "evaluate", evaluate)
    assert train(tiny_config(eval_every=10)) == 130
    run = tmp_path / "working" / "1"
    assert checkpoint.load_latest(run / "checkpoints").step == 10
    assert not list((run / "saves").glob("samples-*"))
    monkeypatch.setattr(evaluator_module, "evaluate", real)
    assert train(tiny_config(eval_every=10), resume=run) == 0
    assert sorted(p.name for p in (run / "saves").glob("samples-*")) == [
        f"samples-000000{step}.png" for step in (10, 20, 30)
    ]


def test_the_last_steps_of_a_run_are_logged_too(tiny_config, tmp_path):
    train(tiny_config(steps=4))
    run = tmp_path / "working" / "1"
    assert [row["step"] for row in rows_of(run)] == [4]
    assert (run / "saves" / "loss.png").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tiny_config, tmp_path, monkeypatch):
    real = TrainStep.__call__

    def call(self, images, number, index=None):
        if number == 14:
            with torch.no_grad():
                self.parameters[3].fill_(float("inf"))
        real(self, images, number, index)

    monkeypatch.setattr(TrainStep, "__call__", call)
    with pytest.raises(TrainingFailed, match=r"step 15 is not finite; .* last good checkpoint is .*step-10"):
        train(tiny_config())
    saved = checkpoint.load_latest(tmp_path / "working" / "1" / "checkpoints")
    assert saved.step == 10
    assert all(value.isfinite().all() for value in saved.state["model"].values())


def test_pictures_that_cannot_be_written_cost_no_run(tiny_config, tmp_path, monkeypatch, capsys):
    run = tmp_path / "working" / "1"

    def unwritable(*_, **__):
        raise PermissionError(13, "Permission denied", "picture.png")

    for module, name in ((pictures, "save_grid"), (pictures, "save_labelled"), (plots, "plot_run")):
        monkeypatch.setattr(module, name, unwritable)
    assert train(tiny_config(steps=4)) == 0
    assert checkpoint.load_latest(run / "checkpoints").step == 4
    assert "picture.png could not be written: Permission denied" in capsys.readouterr().out


def test_bad_starts_leave_no_run_directory(tiny_config, tmp_path):
    for bad in (
        tiny_config(data=str(tmp_path / "missing")),
        tiny_config(features="efficientnet_lite0", feature_size=1),
        tiny_config(data="digits", split="test"),
        tiny_config(eval_few_steps=(2,), last_level=1e9),
        tiny_config(few_step="flow-map", objective="flow", eval_sampler="consistency", last_level=1e9),
    ):
        with pytest.raises(UserError):
            train(bad)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device is 'cuda'"):
            train(tiny_config(device="cuda"))
    assert not (tmp_path / "working").exists()
    with pytest.raises(UserError):
        train(tiny_config(), resume=tmp_path / "nothing")


@pytest.mark.parametrize(("final", "last"), [(None, 6.0), (8, 0.5)])
def test_the_best_checkpoint_is_kept(tiny_config, tmp_path, monkeypatch, final, last):
    """A last evaluation by more samples, which make the distance smaller, does not take its place."""
    values = iter([3.0, 1.0, 2.0, 4.0, 5.0, last])

    class FakeDistance:
        metric, reference = "fd_fake", "tiny"

    def evaluate(*arguments, keep, **options):
        row = {"sampler": "ddim", "sampler_steps": 2, "eta": 0.0, "metric": "fd_fake", "value": next(values),
               "samples": options["n"], "features": "fake", "feature_size": 8, "reference": "tiny",
               "seconds": 0.1}  # fmt: skip
        return row, torch.zeros(keep, 8, 8, 3, dtype=torch.uint8).numpy()

    monkeypatch.setattr(evaluator_module, "evaluate", evaluate)
    monkeypatch.setattr(parts, "make_extractor", lambda *a, **k: None)
    monkeypatch.setattr(parts, "FrechetDistance", lambda *a, **k: FakeDistance())
    train(tiny_config(eval_every=5, keep_last=2, features="auto", eval_samples=4, final_eval_samples=final))
    run = tmp_path / "working" / "1"
    assert [p.name for p in checkpoint.list_checkpoints(run / "checkpoints")] == ["step-10", "step-25", "step-30"]
    state = checkpoint.load_latest(run / "checkpoints").state
    assert (state["best"]["step"], state["best"]["metric"], state["best"]["value"]) == (10, "fd_fake", 1.0)
    assert [row["value"] for row in state["fid_history"]] == [3.0, 1.0, 2.0, 4.0, 5.0, last]
    assert [row["samples"] for row in state["fid_history"]] == [4] * 5 + [final or 4]


def test_curves_are_drawn_after_evaluations_when_stopped_and_on_a_failure(tiny_config, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_module, "plot", lambda state, *rest: drawn.append(state.step))
    assert train(tiny_config(save_every=5, eval_every=20, steps=30)) == 0
    assert drawn == [20, 30]
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert train(tiny_config(save_every=5)) == 128 + signal.SIGTERM
    assert drawn[2:] == [7]
    with pytest.raises(TrainingFailed):
        train(tiny_config(lr=1e30))
    assert len(drawn) == 4
    monkeypatch.setattr(train_module, "PLOT_SECONDS", 0.0)
    assert train(tiny_config(steps=11, save_every=5)) == 0
    assert drawn[4:] == [5, 10, 11, 11, 11]  # the last step is saved before its evaluation and after it


def test_few_steps_are_measured_beside_the_main_row(tiny_config, tmp_path, monkeypatch, capsys):
    drawn = []

    class FakeDistance:
        metric, reference = "fd_fake", "tiny"

    def evaluate(generator, distance, *, n, keep, **options):
        settings = generator.settings
        drawn.append((settings.label, settings.steps, None if distance is None else n))
        row = {"sampler": settings.label, "sampler_steps": settings.steps, "metric": "fd_fake", "samples": n,
               "value": 9.0 - settings.steps, "seconds": 0.1}  # fmt: skip
        return row, torch.zeros(keep, 8, 8, 3, dtype=torch.uint8).numpy()

    monkeypatch.setattr(evaluator_module, "evaluate", evaluate)
    monkeypatch.setattr(parts, "make_extractor", lambda *a, **k: None)
    monkeypatch.setattr(parts, "FrechetDistance", lambda *a, **k: FakeDistance())
    train(tiny_config(eval_every=15, features="auto", eval_samples=4, eval_few_steps=(1, 4), last_level=0.9))
    few = [("consistency (last_level=0.9)", steps, 4) for steps in (1, 4)]
    assert drawn == [*few, ("ddim", 2, 4)] * 2
    said = [line.split() for line in capsys.readouterr().out.splitlines() if "fd_fake " in line and "samples" in line]
    assert [words[-4] for words in said] == list("124124")
    run = tmp_path / "working" / "1"
    rows = [row for row in rows_of(run) if row["kind"] == "eval"]
    assert [(row["step"], row["sampler_steps"]) for row in rows] == [(s, n) for s in (15, 30) for n in (1, 4, 2)]
    assert checkpoint.load_latest(run / "checkpoints").state["best"]["value"] == 7.0
    assert {"few-step.png", "fid.png"} <= {path.name for path in (run / "saves").iterdir()}


def test_a_save_that_fails_in_the_background_does_not_cost_the_last_one(tiny_config, tmp_path, monkeypatch, capsys):
    real = checkpoint.save

    def save(directory, step, state):
        if step == 10:
            time.sleep(1)
            raise checkpoint.NotSaved(28, "step-10 is not saved: no space")
        return real(directory, step, state)

    monkeypatch.setattr(checkpoint, "save", save)
    assert train(tiny_config(steps=11, save_every=10)) == 0
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "working" / "1" / "checkpoints")] == ["step-11"]
    assert "step-10 is not saved" in capsys.readouterr().out


def test_fixed_buffers_train_the_same(tiny_config, tmp_path):
    for graphs in (False, True):
        train(tiny_config(steps=10, graphs=graphs, run_root=str(tmp_path / str(graphs))))
    assert_same_run(tmp_path / "False" / "1", tmp_path / "True" / "1")
    for name in ("samples-00000010.png", "trajectory-00000010.png"):
        one, other = ((tmp_path / str(graphs) / "1" / "saves" / name).read_bytes() for graphs in (False, True))
        assert one == other


def test_float32_means_float32(tiny_config):
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    train(tiny_config(steps=1))
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark == torch.cuda.is_available()


def test_the_device_is_waited_for_once_a_boundary(tiny_config, monkeypatch):
    reads, real = [], Metrics.transfer

    def read(self):
        reads.append(1)
        return real(self)

    monkeypatch.setattr(Metrics, "transfer", read)
    train(tiny_config(steps=20, eval_every=10))  # each boundary logs, saves, evaluates, and saves again
    assert len(reads) == 3  # the first step, whose compilation is not timed, and two boundaries


def test_what_the_first_step_takes_is_no_training_time(tiny_config, tmp_path, monkeypatch):
    real = TrainStep.__call__

    def call(self, images, number, index=None):
        if number in (0, 10):  # as if it compiled; the second process resumes at 10
            time.sleep(1.5)
        real(self, images, number, index)

    monkeypatch.setattr(TrainStep, "__call__", call)
    train(tiny_config(steps=10))
    run = tmp_path / "working" / "1"
    train(tiny_config(steps=20), resume=run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20]
    for row, last in zip(rows, (0.0, rows[0]["seconds"]), strict=True):
        assert row["images_per_second"] == pytest.approx(9 * 8 / (row["seconds"] - last))  # without its first step
        assert row["seconds"] - last < 1.5
    # A row that is due right after the first step has nothing else to time.
    train(tiny_config(steps=1, log_every=1))
    row = json.loads((tmp_path / "working" / "2" / "metrics.jsonl").read_text())
    assert row["seconds"] >= 1.5


def test_the_dali_loader_trains_the_same(tiny_config, tmp_path):
    for loader in ("resident", "dali"):
        train(tiny_config(steps=10, loader=loader, run_root=str(tmp_path / loader)))
    assert_same_run(tmp_path / "resident" / "1", tmp_path / "dali" / "1")


@pytest.mark.parametrize("objective", ["x0", "v", "score", "flow", "edm"])
def test_another_objective_is_one_flag(tiny_config, tmp_path, objective):
    assert train(tiny_config(objective=objective, steps=2)) == 0
    (row,) = rows_of(tmp_path / "working" / "1")
    assert 0 < row["loss"] < 10
    assert (tmp_path / "working" / "1" / "saves" / "samples-00000002.png").exists()


def test_the_golden_curve(tiny_config, tmp_path, train_in_new_process):
    """20 losses on a CPU: bit-equal in a fresh process, and equal to the recorded ones up to another CPU's rounding."""
    config = tiny_config(steps=20, log_every=1)
    train(config)
    here = [row["loss"] for row in rows_of(tmp_path / "working" / "1")]
    train_in_new_process(config)
    assert [row["loss"] for row in rows_of(tmp_path / "working" / "2")] == here
    assert here == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)

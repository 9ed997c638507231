"""Runs for few steps: their precision by stage, and the watch on what the network knew."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff.training.train as train_module
from fastdiff.diffusion.consistency import Consistency
from fastdiff.evaluation.denoising import DenoisingError
from fastdiff.evaluation.evaluator import Evaluator
from fastdiff.runs import checkpoint
from fastdiff.training import parts
from fastdiff.training.step import TrainStep
from fastdiff.training.train import train
from tests.training.runs import rows_of

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_each_stage_computes_in_its_precision(tiny_config, monkeypatch, capsys):
    seen, real = [], Consistency.loss

    def loss(self, *args, **cond):
        now = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        seen.append((torch.is_autocast_enabled("cpu"), *now))
        return real(self, *args, **cond)

    def evaluate(self, *args, **kwargs):
        assert not torch.backends.cudnn.allow_tf32
        assert not self.generator.bf16

    monkeypatch.setattr(Consistency, "loss", loss)
    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    stages = {"few_step": "consistency", "objective": "edm", "q": 2.0, "stages": 5, "stage_images": 16}
    config = tiny_config(**stages, precision="staged", steps=12, eval_every=3, batch_size=8)
    train(config)
    assert seen == [(True, "highest", False)] * 2 + [(False, "high", True)] * 6 + [(False, "highest", False)] * 4
    said = capsys.readouterr().out
    assert "precision  staged: bf16 while gap is at least 0.3, tf32 while" in said
    assert "precision  bf16 autocast, float32 weights, TF32 off from step 1" in said
    assert "precision  float32, products rounded to TF32 where the device can from step 3" in said
    assert "precision  float32, TF32 off from step 9" in said


def test_steps_before_a_change_of_precision_are_in_the_time_and_compiling_is_not(tiny_config, tmp_path, monkeypatch):
    now, call, compute_in = [0.0], TrainStep.__call__, TrainStep.compute_in

    def takes(seconds, method, self, *args):
        now[0] += seconds
        return method(self, *args)

    monkeypatch.setattr(train_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(TrainStep, "__call__", lambda *args: takes(1, call, *args))
    monkeypatch.setattr(TrainStep, "compute_in", lambda *args: takes(100, compute_in, *args))
    stages = {"few_step": "consistency", "objective": "edm", "q": 2.0, "stages": 5, "stage_images": 16}
    assert train(tiny_config(**stages, precision="staged", steps=12, batch_size=8, log_every=12)) == 0
    row = json.loads((tmp_path / "working" / "1" / "metrics.jsonl").read_text().splitlines()[1])
    assert row["seconds"] == 12 - 3  # steps 1, 3 and 9 compile
    assert row["images_per_second"] == 8


def test_training_for_few_steps_warns_where_it_unlearns(tiny_config, tmp_path, capsys, monkeypatch):
    assert train(tiny_config(objective="edm", steps=40, lr=2e-3, run_root=str(tmp_path / "teacher"))) == 0
    few = {"few_step": "consistency", "objective": "edm", "init_from": str(tmp_path / "teacher" / "1"), "log_every": 2}
    capsys.readouterr()
    good, bad = str(tmp_path / "good"), str(tmp_path / "bad")
    train(tiny_config(**few, steps=6, lr=1e-9, run_root=good))
    said = capsys.readouterr().out
    assert "err " not in said
    assert "objective  edm on edm, consistency, weighting uniform: 1 / (rho_t - rho_r)\n" in said
    errors = [row["denoising_error"] for row in rows_of(Path(good) / "1") if row["kind"] == "train"]
    assert errors == pytest.approx([errors[0]] * 4, rel=1e-3)  # from before the first step on
    spoilt = tiny_config(**few, steps=6, lr=0.3, warmup_steps=0, ema_decay=0.1, run_root=bad)
    train(spoilt)
    said = capsys.readouterr().out
    assert said.count("times as much as they did (denoising_error)") == 1
    rows = [row["denoising_error"] for row in rows_of(Path(bad) / "1") if row["kind"] == "train"]
    assert max(rows) > 2.5 * errors[0]
    train(spoilt.replace(steps=10), resume=Path(bad) / "1")
    assert "denoising_error" not in capsys.readouterr().out  # once in a run
    least = checkpoint.load_latest(Path(bad) / "1" / "checkpoints").state["least_error"]
    assert least == pytest.approx(errors[0], rel=0.1)  # of the whole run


@pytest.mark.parametrize(
    ("few_step", "changes", "told"),
    [
        (
            "consistency",
            {"teacher_solver": "heun", "teacher_steps": 2, "weighting": "image"},
            "guidance 1, 2 steps of heun, weighting image: 1",
        ),
        ("scm", {}, "guidance 1"),  # which takes no step
    ],
)
def test_a_run_says_how_its_teacher_leads(tiny_config, tmp_path, capsys, few_step, changes, told):
    assert train(tiny_config(objective="edm", steps=1, run_root=str(tmp_path / "teacher"))) == 0
    teacher = str(tmp_path / "teacher" / "1")
    assert train(tiny_config(objective="edm", few_step=few_step, teacher=teacher, steps=1, **changes)) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"edm on edm, {few_step} by the teacher {teacher}, {told} network" in " ".join(said.split())


def test_the_watch_asks_the_average_and_tells_it_all_about_the_images(tiny_config, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(parts, "DenoisingError", lambda *args, batch_size: given.append((*args, batch_size)))
    images, labels = np.random.default_rng(0).integers(0, 256, (90, 8, 8, 3), dtype=np.uint8), np.arange(90) % 3
    np.savez(tmp_path / "labelled.npz", images=images, labels=labels)
    config = tiny_config(data=str(tmp_path / "labelled.npz"), conditional=True, label_dropout=0.9, steps=1)
    assert train(config) == 0
    assert not given  # it is for few steps
    assert train(config.replace(few_step="consistency", objective="edm")) == 0
    ((network, _, x0, cond, batch_size),) = given
    assert not network.training
    assert batch_size == config.eval.eval_batch_size
    index = np.linspace(0, 89, 64, dtype=np.int64)
    assert cond["labels"].tolist() == labels[index].tolist()  # none is left out
    assert torch.equal((127.5 * x0 + 127.5).round().permute(0, 2, 3, 1).byte(), torch.from_numpy(images[index]))


@pytest.mark.parametrize(
    ("few_step", "errors", "least", "alarmed", "advice"),
    [
        ("consistency", [1.0, 0.9, 0.8, 0.1], 0.8, False, ""),
        ("consistency", [1.0, 2.4, 2.4, 2.4], 1.0, False, ""),
        ("consistency", [1.0, 2.4, 2.6, 2.4], 1.0, True, r"err 2.6 times .* lower --lr or --q\.$"),
        ("scm", [1.0, 0.9, 0.8, 9.0], 0.8, False, r"err 11.2 times as much as they did .* lower --lr\.$"),
        ("consistency", [1.0, math.nan, 0.9, 0.9], 0.9, True, r"err nan times .* lower --lr or --q\.$"),
    ],
)
def test_the_least_denoising_error_is_of_whole_rows(
    tiny_config, tmp_path, monkeypatch, capsys, few_step, errors, least, alarmed, advice
):
    values = iter(errors)  # before the first step and after steps 2, 4, and 5, whose row a longer run would not have
    monkeypatch.setattr(DenoisingError, "__call__", lambda self: next(values))
    assert train(tiny_config(few_step=few_step, objective="edm", steps=5, log_every=2)) == 0
    state = checkpoint.load_latest(tmp_path / "working" / "1" / "checkpoints").state
    assert (state["least_error"], state["alarmed"]) == (least, alarmed)
    said = re.findall("^warning .*denoising_error.*$", capsys.readouterr().out, re.MULTILINE)
    assert len(said) == bool(advice)
    assert all(re.search(advice, line) for line in said)

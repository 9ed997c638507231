"""A run that was stopped goes on as if it had not been, or says why it cannot."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch

from fastdiff.config import Config
from fastdiff.errors import UserError
from fastdiff.evaluation.evaluate import load_trained
from fastdiff.evaluation.evaluator import Evaluator
from fastdiff.nets.text import READERS
from fastdiff.nets.unet import UNet
from fastdiff.runs import checkpoint
from fastdiff.training.train import train
from tests.training.runs import assert_same_run, rows_of, stop_at

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize("stop", [1, 7, 20])  # the 7th step holds the edge of the first epoch
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


@pytest.mark.parametrize("precision", ["fp32", "staged"])
def test_consistency_training_resumes_bit_for_bit_in_its_stage(tiny_config, tmp_path, monkeypatch, precision):
    config = {"few_step": "consistency", "objective": "edm", "q": 2.0, "stages": 3, "stage_images": 80}
    config["precision"] = precision
    assert train(tiny_config(**config, run_root=str(tmp_path / "whole"))) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 13)
        assert train(tiny_config(**config)) == 128 + signal.SIGTERM
    run = tmp_path / "working" / "1"
    assert train(tiny_config(**config), resume=run) == 0
    assert_same_run(tmp_path / "whole" / "1", run)
    assert [row["gap"] for row in rows_of(run) if "gap" in row] == [0.5, 0.25, 0.125]


def test_a_run_that_was_stopped_in_its_first_evaluation_resumes_as_if_not(tiny_config, tmp_path, monkeypatch):
    config = {"few_step": "consistency", "objective": "edm", "q": 2.0, "eval_at_start": True, "eval_every": 20}
    assert train(tiny_config(**config, run_root=str(tmp_path / "whole"))) == 0
    evaluate = Evaluator.__call__

    def stopped(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", stopped)
        assert train(tiny_config(**config)) == 128 + signal.SIGTERM
    run = tmp_path / "working" / "1"
    assert checkpoint.load_latest(run / "checkpoints").step == 0
    assert train(tiny_config(**config), resume=run) == 0
    assert [row["step"] for row in rows_of(run) if row["kind"] == "train"] == [0, 10, 20, 30]
    assert_same_run(tmp_path / "whole" / "1", run)


def test_a_flow_map_begins_as_its_teacher_and_resumes_bit_for_bit(tiny_config, tmp_path, monkeypatch):
    flow = {"objective": "flow", "schedule": "flow"}
    assert train(tiny_config(**flow, steps=5, run_root=str(tmp_path / "teacher"))) == 0
    teacher = str(tmp_path / "teacher" / "1")
    config = tiny_config(
        **flow, few_step="flow-map", q=4.0, stage_images=100, init_from=teacher, eval_sampler="flow-map"
    )
    assert train(config.replace(steps=1, lr=1e-30, run_root=str(tmp_path / "first"))) == 0
    cpu = torch.device("cpu")
    old, new = (load_trained(path, device=cpu) for path in (teacher, tmp_path / "first" / "1"))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor(0.7).double()
    for r in (0.7, 0.1):
        one, other = (each.objective.denoise(each.model, x, t, t.new_tensor(r)) for each in (old, new))
        assert torch.equal(one, other)
    assert train(config.replace(run_root=str(tmp_path / "whole"))) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 13)
        assert train(config) == 128 + signal.SIGTERM
    run = tmp_path / "working" / "1"
    config = Config.from_dict(checkpoint.load_latest(run / "checkpoints").state["config"])
    assert train(config, resume=run) == 0
    assert_same_run(tmp_path / "whole" / "1", run)
    assert checkpoint.load_latest(run / "checkpoints").state["model"]["span.linear_2.weight"].abs().max() > 0


@pytest.mark.parametrize(
    "flags",
    [{"few_step": "mean-flow", "objective": "flow", "init_from": "own"},
     {"few_step": "scm", "objective": "edm", "teacher": "own", "stage_images": 150}],
    ids=lambda flags: flags["few_step"],
)  # fmt: skip
def test_with_exact_derivatives_a_run_trains_and_resumes_bit_for_bit(tiny_config, tmp_path, monkeypatch, flags):
    assert train(tiny_config(objective=flags["objective"], steps=3, run_root=str(tmp_path / "own"))) == 0
    flags = {name: str(tmp_path / "own" / "1") if value == "own" else value for name, value in flags.items()}
    config = tiny_config(**flags, dropout=0.1, steps=12, eval_every=12)
    assert train(config.replace(run_root=str(tmp_path / "whole"))) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert train(config) == 128 + signal.SIGTERM
    run = tmp_path / "working" / "1"
    assert train(Config.from_dict(checkpoint.load_latest(run / "checkpoints").state["config"]), resume=run) == 0
    assert_same_run(tmp_path / "whole" / "1", run)


def test_a_student_resumes_bit_for_bit_and_only_with_its_teacher(tiny_config, labelled, tmp_path, monkeypatch):
    data = {"conditional": True, "data": labelled("cat", "dog"), "objective": "edm"}
    assert train(tiny_config(**data, steps=10, run_root=str(tmp_path / "teacher"))) == 0
    teacher = tmp_path / "teacher" / "1"
    before = checkpoint.load_latest(teacher / "checkpoints").state["ema"]
    config = tiny_config(
        **data, few_step="consistency", q=8.0, teacher=str(teacher), teacher_solver="heun", teacher_guidance=2.0,
        steps=14, optimizer="radam",
    )  # fmt: skip
    assert train(config.replace(run_root=str(tmp_path / "whole"))) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert train(config) == 128 + signal.SIGTERM
    run = tmp_path / "working" / "1"
    moved = teacher.rename(tmp_path / "moved")
    config = Config.from_dict(checkpoint.load_latest(run / "checkpoints").state["config"])
    with pytest.raises(UserError, match="teacher/1"):
        train(config, resume=run)
    assert train(config.replace(teacher=str(moved)), resume=run) == 0
    assert_same_run(tmp_path / "whole" / "1", run)
    after = checkpoint.load_latest(moved / "checkpoints").state["ema"]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    saved = checkpoint.load_latest(run / "checkpoints").state
    assert len(saved["teacher_sha256"]) == 64
    assert saved["model"].keys() == before.keys()
    assert train(tiny_config(**data, steps=1, run_root=str(tmp_path / "other"))) == 0
    for changes, message in (
        ({"teacher": str(tmp_path / "other" / "1")}, "holds other weights than those that the run has learned from"),
        ({"teacher": None, "teacher_guidance": 1.0}, "cannot"),
    ):
        with pytest.raises(UserError, match=message):
            train(config.replace(steps=16, **changes), resume=run)


def test_a_conditional_run_resumes_bit_for_bit_under_its_classes_first_names(
    tiny_config, labelled, tmp_path, monkeypatch
):
    config = {"conditional": True, "label_dropout": 0.3, "accumulate": 2}
    assert train(tiny_config(**config, data=labelled("cat", "dog"), run_root=str(tmp_path / "whole"))) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert train(tiny_config(**config, data=labelled("cat", "dog"))) == 128 + signal.SIGTERM
    run = tmp_path / "working" / "1"
    other = labelled("feline", "canine", name="others.npz")
    again = Config.from_dict(checkpoint.load_latest(run / "checkpoints").state["config"]).replace(data=other)
    assert train(again, resume=run) == 0
    saved = checkpoint.load_latest(run / "checkpoints")
    assert Config.from_dict(saved.state["config"]).conditions.class_names == ("cat", "dog")
    assert saved.state["model"]["label.weight"].abs().sum(1).gt(0).tolist() == [True, True, True]
    whole = checkpoint.load_latest(tmp_path / "whole" / "1" / "checkpoints")
    assert all(torch.equal(saved.state["model"][name], v) for name, v in whole.state["model"].items())


@pytest.mark.parametrize(("text", "blocks"), [("bytes", 1), ("words", 0)])
def test_a_run_with_captions_resumes_bit_for_bit_and_only_with_its_captions(
    tiny_config, labelled, tmp_path, monkeypatch, text, blocks
):
    templates = tmp_path / "templates.txt"
    templates.write_text("a {}\none more {}\n")
    config = {
        "text": text, "kernels": "triton", "captions": str(templates), "text_width": 8, "text_blocks": blocks,
        "caption_dropout": 0.3, "data": labelled("cat", "dog"), "eval_every": 20,
    }  # fmt: skip
    assert train(tiny_config(**config, run_root=str(tmp_path / "whole"))) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert train(tiny_config(**config)) == 128 + signal.SIGTERM
    run = tmp_path / "working" / "1"
    again = Config.from_dict(checkpoint.load_latest(run / "checkpoints").state["config"])
    assert train(again, resume=run) == 0
    assert_same_run(tmp_path / "whole" / "1", run)
    saved, net = checkpoint.load_latest(run / "checkpoints").state, UNet(again.net)
    for part in ("model", "ema"):
        net.load_state_dict(saved[part])
        assert net.text.unseen(READERS[text][0](["a", "z"])[:, 1]).tolist() == [False, True]
    assert (run / "saves" / "samples-00000020.png").exists()
    templates.write_text("two {}\n")
    with pytest.raises(UserError, match="has other captions than those"):
        train(again.replace(steps=40), resume=run)


def test_a_network_with_texts_may_start_from_one_without_their_mean(tiny_config, labelled, tmp_path):
    templates = tmp_path / "templates.txt"
    templates.write_text("a {}\n")
    config = {
        "text": "words", "captions": str(templates), "text_width": 8, "text_blocks": 0, "data": labelled("cat", "dog"),
        "steps": 2, "eval_every": 2,
    }  # fmt: skip
    assert train(tiny_config(**config, text_pooled=False)) == 0
    run, more = tmp_path / "working" / "1", tmp_path / "more"
    assert train(tiny_config(**config, init_from=str(run), run_root=str(more))) == 0
    assert "pooled.linear.weight" in checkpoint.load_latest(more / "1" / "checkpoints").state["ema"]
    with pytest.raises(UserError, match=r"Add --text-pooled\.$"):
        train(tiny_config(**config, text_pooled=False, init_from=str(more / "1")))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_student_of_texts_learns_from_a_teacher_that_reads_them_too(tiny_config, labelled, tmp_path, kernels):
    templates = tmp_path / "templates.txt"
    templates.write_text("a {}\none more {}\n")
    config = {
        "text": "bytes", "captions": str(templates), "text_width": 8, "text_blocks": 1, "data": labelled("cat", "dog"),
        "steps": 2, "eval_every": 2, "objective": "edm", "kernels": kernels,
    }  # fmt: skip
    assert train(tiny_config(**config)) == 0
    teacher = tmp_path / "working" / "1"
    student = {"few_step": "consistency", "teacher": str(teacher), "teacher_guidance": 2.0}
    assert train(tiny_config(**config, **student, run_root=str(tmp_path / "student"))) == 0
    before, after = (
        checkpoint.load_latest(run / "checkpoints").state["model"] for run in (teacher, tmp_path / "student" / "1")
    )
    assert before.keys() == after.keys()
    assert not torch.equal(before["text.byte.weight"], after["text.byte.weight"])  # it learns to read by itself


@pytest.mark.parametrize(("given", "message"), [(("cat",), "all images of .* are of one"), ((), "has none; sort")])
def test_a_conditional_run_needs_classes(tiny_config, labelled, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        train(tiny_config(conditional=True, data=labelled(*given) if given else tiny_config().images.data))
    assert not (tmp_path / "working").exists()


@pytest.mark.slow  # tests/reliability/test_exact_resume.py has it with new processes too
def test_resuming_in_new_processes_is_bit_equal_too(tiny_config, tmp_path, train_in_new_process):
    assert train(tiny_config(run_root=str(tmp_path / "whole"))) == 0
    train_in_new_process(tiny_config(steps=13))
    run = tmp_path / "working" / "1"
    done = train_in_new_process(tiny_config(), "--resume", str(run))
    assert "step 20/30" in done.stdout
    assert_same_run(tmp_path / "whole" / "1", run)


@pytest.mark.parametrize(("before", "after", "expected"), [(10, 7, [10, 20, 21, 28, 30]), (7, 10, [7, 14, 30])])
def test_rows_are_kept_as_the_checkpoint_counts_them_whatever_the_next_interval(
    tiny_config, tmp_path, before, after, expected
):
    run = tmp_path / "working" / "1"
    train(tiny_config(steps=20, log_every=before, save_every=20))
    train(tiny_config(log_every=after, save_every=20), resume=run)
    assert [row["step"] for row in rows_of(run)] == expected
    history = [step for step, _ in checkpoint.load_latest(run / "checkpoints").state["loss_history"]]
    assert history == [step for step in expected if step != 30 or after == 10]


def test_rows_after_the_checkpoint_are_written_again_once(tiny_config, tmp_path):
    train(tiny_config())
    run = tmp_path / "working" / "1"
    expected = rows_of(run)
    (run / "checkpoints" / "step-30" / "model.safetensors").write_bytes(b"damaged")
    assert train(tiny_config(), resume=run) == 0
    assert rows_of(run) == expected


def test_a_damaged_newest_checkpoint_never_costs_the_good_ones(tiny_config, tmp_path):
    train(tiny_config(steps=20))
    run = tmp_path / "working" / "1"
    (run / "checkpoints" / "step-20" / "model.safetensors").write_bytes(b"damaged")
    train(tiny_config(steps=15, keep_last=1), resume=run)
    assert checkpoint.load_latest(run / "checkpoints").step == 15


def test_resuming_on_other_images_is_refused(tiny_config, tmp_path):
    train(tiny_config(steps=10))
    np.savez(tmp_path / "images.npz", images=np.arange(50 * 192, dtype=np.uint8).reshape(50, 8, 8, 3))
    with pytest.raises(UserError, match="holds other images"):
        train(tiny_config(), resume=tmp_path / "working" / "1")


def test_resuming_may_not_change_what_is_trained(tiny_config, tmp_path):
    train(tiny_config(steps=10))
    run = tmp_path / "working" / "1"
    changed = tiny_config(lr=2e-3, dropout=0.2)
    with pytest.raises(UserError, match=r"--dropout was 0\.1, now 0\.2; --lr was 0\.001, now 0\.002"):
        train(changed, resume=run)
    assert train(tiny_config(steps=12, log_every=1), resume=run) == 0
    assert checkpoint.load_latest(run / "checkpoints").step == 12
    assert json.loads((run / "config.json").read_text())["run"]["steps"] == 12


def test_a_run_may_go_on_in_smaller_parts(tiny_config, tmp_path):
    plain = dataclasses.replace(tiny_config().net, dropout=0.0)
    train(tiny_config(steps=20, net=plain, run_root=str(tmp_path / "whole")))
    train(tiny_config(steps=10, net=plain))
    train(tiny_config(steps=20, net=plain, accumulate=4), resume=tmp_path / "working" / "1")
    whole, parts = (rows_of(tmp_path / root / "1") for root in ("whole", "working"))
    assert [row["loss"] for row in parts] == pytest.approx([row["loss"] for row in whole], rel=1e-4)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_run_by_another_optimizer_resumes_bit_for_bit(tiny_config, tmp_path, kernels):
    options = {"optimizer": "radam", "kernels": kernels, "steps": 12, "weight_decay": 0.01}
    train(tiny_config("whole", **options))
    train(tiny_config(**options | {"steps": 7}))
    run = tmp_path / "working" / "1"
    with pytest.raises(UserError, match="--optimizer was 'radam', now 'adam'"):
        train(tiny_config(**options | {"optimizer": "adam"}), resume=run)
    train(tiny_config(**options), resume=run)
    assert_same_run(tmp_path / "whole" / "1", run)


@pytest.mark.parametrize("decay", ["linear-decay", "wsd"])
def test_a_run_resumes_bit_for_bit_through_its_decay(tiny_config, tmp_path, decay):
    options = {"lr_decay": decay, "steps": 12, "decay_fraction": 0.5, "log_every": 1, "save_every": 8}
    train(tiny_config("whole", **options))
    train(tiny_config(**options))
    run = tmp_path / "working" / "1"
    (run / "checkpoints" / "step-12" / "model.safetensors").write_bytes(b"damaged")
    train(tiny_config(**options), resume=run)
    assert_same_run(tmp_path / "whole" / "1", run)
    last = 6 if decay == "wsd" else 7  # of 12 steps, after a warm-up of 5
    fall = [1e-3 * left / last for left in range(last, 0, -1)]
    assert [row["lr"] for row in rows_of(run)][-last:] == pytest.approx(fall)


def test_a_decay_branches_off_a_constant_run(tiny_config, tmp_path):
    """And is the run that had this decay from the start; where steps made would be others, it is refused."""
    options = {"lr_decay": "wsd", "steps": 12, "decay_fraction": 0.25, "log_every": 1}
    train(tiny_config("whole", **options))
    train(tiny_config(steps=9, log_every=1))
    run = tmp_path / "working" / "1"
    with pytest.raises(UserError, match=r"made 9 steps .* is constant, .* falling from step 5 .* from step 9 or later"):
        train(tiny_config(lr_decay="linear-decay", steps=12), resume=run)
    with pytest.raises(UserError, match="falling from step 8 to 0 at step 10"):
        train(tiny_config(**options | {"steps": 10}), resume=run)
    train(tiny_config(**options), resume=run)
    assert_same_run(tmp_path / "whole" / "1", run)
    for other in ({"steps": 13}, {"lr_decay": "constant"}, {"decay_fraction": 0.5}):
        with pytest.raises(UserError, match=r"made 12 steps .* is falling from step 9 .* Keep --lr-decay"):
            train(tiny_config(**options | other), resume=run)

"""Runs that train an autoencoder."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import train_cifar
from fastdiff.cli import run_command
from fastdiff.data.datasets import load_dataset
from fastdiff.data.pixels import normalize, to_uint8
from fastdiff.errors import UserError
from fastdiff.nets.autoencoder import Autoencoder
from fastdiff.runs import checkpoint
from fastdiff.training.train import train
from tests.evaluation.commands import call
from tests.training.runs import SHAPE, assert_same_run, rows_of, stop_at

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_an_autoencoder_trains_draws_and_measures(autoencoder, tmp_path, capsys):
    assert train(autoencoder.replace(eval_every=5, eval_samples=20)) == 0
    run = tmp_path / "auto" / "1"
    rows = [row for row in rows_of(run) if row["kind"] == "eval"]
    assert [row["step"] for row in rows] == [5, 10]
    assert rows[1]["metric"] == "rmse"
    assert rows[1]["value"] < rows[0]["value"]
    assert rows[1]["psnr"] > rows[0]["psnr"] > 0
    assert "ssim" not in rows[0] or rows[0]["ssim"] is None  # its window is larger than the images
    assert rows[1]["samples"] == 20
    assert not (run / "loss-by-noise.jsonl").read_text()
    out = capsys.readouterr().out
    assert "\nnetwork    autoencoder, latents 4x4 of 4 channels, " in out
    assert "PSNR" in out


def test_its_rows_are_of_the_images_that_are_drawn(autoencoder, tmp_path):
    assert train(autoencoder.replace(eval_samples=50)) == 0
    (row,) = [row for row in rows_of(tmp_path / "auto" / "1") if row["kind"] == "eval"]
    model = Autoencoder(SHAPE)
    saved = checkpoint.load_latest(tmp_path / "auto" / "1" / "checkpoints").state
    model.load_state_dict(saved["ema"])
    x = torch.from_numpy(load_dataset(autoencoder.images.data, image_size=8).images)
    with torch.no_grad():
        mean, log_var = model.eval().encode(normalize(x))
        squared = (to_uint8(model.decode(mean)).float() - x.permute(0, 3, 1, 2).float()).square().flatten(1).mean(1)
    assert row["value"] == pytest.approx(squared.mean().sqrt().item(), rel=1e-6)
    assert row["psnr"] == pytest.approx((10 * torch.log10(255**2 / squared)).mean().item(), rel=1e-6)
    assert row["latent_mean"] == pytest.approx(mean.mean().item(), abs=1e-6)
    std = (mean.movedim(1, 0).flatten(1).var(1, correction=0) + log_var.exp().mean((0, 2, 3))).sqrt()
    assert row["latent_std"] == pytest.approx(std.mean().item(), rel=1e-5)
    for state in (saved["ema"], saved["model"]):
        torch.testing.assert_close(state["latent_std"], std)
        torch.testing.assert_close(state["latent_mean"], mean.mean((0, 2, 3)))


@pytest.mark.parametrize("flags", [{}, {"kernels": "triton", "critic_weight": 0.1, "critic_start": 40}])
def test_an_autoencoder_resumes_bit_for_bit(autoencoder, tmp_path, monkeypatch, capsys, flags):
    config = autoencoder.replace(eval_every=5, **flags)
    train(config)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        train(config.replace(run_root=str(tmp_path / "again")))
    assert "resume with: python -m fastdiff autoencoder --resume " in capsys.readouterr().out
    again = config.replace(run_root=str(tmp_path / "again"))
    assert train(again, resume=tmp_path / "again" / "1") == 0
    assert_same_run(tmp_path / "auto" / "1", tmp_path / "again" / "1")


def test_an_autoencoder_may_start_from_another_of_its_shape_only(autoencoder, trained, tiny_config, tmp_path):
    config = autoencoder.replace(init_from=str(trained), steps=1, lr=1e-9, ema_decay=0.0)
    assert train(config) == 0
    before, after = (checkpoint.load_latest(tmp_path / "auto" / n / "checkpoints").state["ema"] for n in "12")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    (tmp_path / "nameless").mkdir()
    (tmp_path / "nameless" / "config.json").write_text("{}")
    save_file({}, tmp_path / "nameless" / "diffusion_pytorch_model.safetensors")
    for wrong, message in (
        (config.replace(init_from=str(tmp_path / "nameless")), "nameless: block_out_channels is None, but must list"),
        (config.replace(base_channels=16), "has --base-channels 8, but this run has 16; add --base-channels 8"),
        (tiny_config(init_from=str(trained)), "holds an autoencoder of factor 2, but this run trains a network"),
    ):
        with pytest.raises(UserError, match=message):
            train(wrong)


def test_an_autoencoder_that_was_never_measured_is_refused(autoencoder, latent, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        train(autoencoder.replace(run_root=str(tmp_path / "early"), save_every=5))
    with pytest.raises(UserError, match="has not been evaluated yet"):
        train(latent.replace(latents=str(tmp_path / "early" / "1")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pixels": 8}, "--pixels is 8, but must be left out without --latents"),
        ({"autoencoder": SHAPE, "image_size": 10}, r"--image-size is 10, but must be a multiple of 4, with --factor 2"),
        ({"autoencoder": SHAPE, "eval_sampler": "heun"}, "--eval-sampler is 'heun', but must be left out"),
        ({"image_channels": 4}, "--image-channels is 4"),
        ({"autoencoder": SHAPE, "conditional": True}, "--conditional is for diffusion networks"),
        ({"autoencoder": SHAPE, "latents": "x"}, "--latents is for diffusion networks"),
        ({"autoencoder": SHAPE, "few_step": "flow-map", "objective": "flow"}, "--few-step is for diffusion networks"),
        ({"critic_weight": -1.0}, "--critic-weight is -1.0"),
        ({"critic_start": 5}, "--critic-start is 5, but must be left out without --critic-weight"),
    ],
)
def test_flags_that_do_not_fit_are_named(tiny_config, flags, message):
    net = {"net": replace(tiny_config().net, channel_mult=(1,), attention_resolutions=())}
    with pytest.raises(UserError, match=message):
        tiny_config(**net, **{"eval_steps": 50} | flags)


def test_the_command_trains_and_resumes(autoencoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = (
        "autoencoder", "--preset", "quick-autoencoder", "--data", tmp_path / "images.npz", "--image-size", 8, "--steps",
        2, "--warmup-steps", 1, "--save-every", 1, "--features", "none", "--base-channels", 8, "--device", "cpu",
    )  # fmt: skip
    assert call(*flags) == 0
    assert call("autoencoder", "--resume", "working/1", "--steps", 3) == 1  # its learning rate has fallen to 0
    assert "Keep --lr-decay" in capsys.readouterr().err
    assert call("autoencoder", "--resume", "working/1", "--base-channels", 16) == 1
    assert "--base-channels was 8, now 16" in capsys.readouterr().err
    assert call("autoencoder", "--preset", "quick") == 2
    assert "which you train by `python train_cifar.py`" in capsys.readouterr().err
    shutil.rmtree(Path("working"))


def test_an_evaluation_for_the_end_is_not_the_best_of_those_during_training(autoencoder, tmp_path):
    """Also where it is of as many images as there are."""
    train(autoencoder.replace(eval_every=5, eval_samples=20, final_eval_samples=10_000))
    state = checkpoint.load_latest(tmp_path / "auto" / "1" / "checkpoints").state
    assert [row["samples"] for row in state["fid_history"]] == [20, 50]
    assert (state["best"]["step"], state["best"]["samples"]) == (5, 20)


def test_its_latents_are_those_of_its_last_evaluation(autoencoder, latent, trained, tmp_path, monkeypatch, capsys):
    """A run that begins with another's weights has measured nothing, and a later checkpoint says when it has."""
    for root, flags in (("begun", {"init_from": str(trained)}), ("later", {"eval_every": 4})):
        with monkeypatch.context() as patch:
            stop_at(patch, 5)
            train(autoencoder.replace(run_root=str(tmp_path / root), **flags))
    with pytest.raises(UserError, match="has not been evaluated yet"):
        train(latent.replace(latents=str(tmp_path / "begun" / "1")))
    capsys.readouterr()
    assert train(latent.replace(latents=str(tmp_path / "later" / "1"), steps=1)) == 0
    assert "its latents were measured at step 4, not at 5" in capsys.readouterr().err


def test_train_cifar_names_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", "--preset", "quick-autoencoder"])
    assert run_command(train_cifar.main) == 2
    assert "train it by `python -m fastdiff autoencoder`" in capsys.readouterr().err

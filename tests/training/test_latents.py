"""Runs of networks in the latents of an autoencoder."""

import json
import shutil

import numpy as np
import pytest
import torch

from fastdiff.config import Config
from fastdiff.data.datasets import load_dataset
from fastdiff.data.loaders import make_loader
from fastdiff.data.pixels import normalize, to_uint8
from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.errors import UserError
from fastdiff.evaluation.evaluate import load_trained
from fastdiff.evaluation.generate import SamplerSettings
from fastdiff.evaluation.space import Latents
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.runs.latents import autoencoder_weights, with_latents
from fastdiff.training import moments as moments_module
from fastdiff.training.moments import latent_moments
from fastdiff.training.train import train
from tests.evaluation.commands import call
from tests.training.runs import CPU, assert_same_run, recorded, stop_at

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_network_trains_and_draws_in_latents(latent, trained, tmp_path, capsys):
    assert train(latent) == 0
    run = tmp_path / "working" / "1"
    config = Config.from_dict(json.loads((run / "config.json").read_text()))
    assert (config.net.image_size, config.net.image_channels, config.pixels) == (4, 4, 8)
    assert config.diffusion.sigma_data == 1.0
    assert "\nlatents    4x4 of 4 channels by " in capsys.readouterr().out
    loaded = load_trained(run, device=CPU)
    assert isinstance(loaded.space, Latents)
    generator = loaded.generator(SamplerSettings("ddim", 3), batch_size=4, device=CPU)
    images = torch.cat(list(generator.batches(6, seed=0)))
    assert images.shape == (6, 3, 8, 8)
    assert images.dtype == torch.uint8
    x_t, x0_hat, _ = generator.trajectory(seed=0, samples=2)
    assert x_t.shape == x0_hat.shape == (2, 3, 3, 8, 8)


@pytest.mark.parametrize("flip", ["on", "off"])
def test_what_the_loader_gives_is_what_the_encoder_gives(latent, trained, flip):
    """Of each image and each mirrored image, and with the mean 0 and the standard deviation 1 over all."""
    weights = autoencoder_weights(latent, {})
    config = with_latents(latent.replace(flip=flip), weights)
    images = load_dataset(config.images.data, image_size=config.pixels)
    space = Latents(weights.make(CPU))
    root = config.images.data_root
    stored = latent_moments(space, images, sha256=weights.sha256, mirrored=flip == "on", root=root)
    both = [
        make_loader("resident", data, batch_size=20, seed=3, flip=flip == "on", start_step=2)
        for data in (images, stored)
    ]
    for _ in range(3):
        pixels, given = (next(loader) for loader in both)
        assert torch.equal(pixels.index, given.index)
        with torch.no_grad():
            mean, log_var = weights.make(CPU).encode(normalize(pixels.images))
        sampled = space.x0(space.sample(given.images, lambda shape: torch.zeros(shape)))
        half = torch.finfo(torch.float16).eps
        torch.testing.assert_close(sampled, space.encode(pixels.images), rtol=half, atol=8 * half)
        torch.testing.assert_close(sampled * space.std + space.mean, mean, rtol=half, atol=16 * half)
        moved = space.x0(space.sample(given.images, torch.ones)) - sampled
        torch.testing.assert_close(moved * space.std, (log_var / 2).exp(), rtol=0.02, atol=16 * half)
    views = torch.from_numpy(stored.images).flatten(0, 1)
    many = torch.cat([space.x0(space.sample(views, torch.randn)) for _ in range(40)])
    exact = 0.02 if flip == "off" else 0.2  # it was measured on the images as they are
    torch.testing.assert_close(many.mean((0, 2, 3)), torch.zeros(4), atol=exact, rtol=0)
    torch.testing.assert_close(many.std((0, 2, 3)), torch.ones(4), atol=exact, rtol=0)


def test_images_are_encoded_once(latent, trained, monkeypatch):
    train(latent.replace(steps=1))
    monkeypatch.setattr(moments_module, "track", None)  # which encoding calls
    train(latent.replace(steps=1, lr=1e-4))
    with pytest.raises(TypeError):
        train(latent.replace(steps=1, flip="off"))


def test_normalised_latents_are_decoded_as_the_latents(trained, latent):
    weights = autoencoder_weights(latent, {})
    model = weights.make(CPU)
    model.latent_mean.copy_(torch.tensor([0.1, -2.0, 3.0, 0.0]))
    model.latent_std.copy_(torch.tensor([0.5, 2.0, 1.0, 4.0]))
    space = Latents(model)
    images = torch.from_numpy(load_dataset(latent.images.data, image_size=8).images[:5])
    with torch.no_grad():
        mean, _ = weights.make(CPU).encode(normalize(images))
        expected = to_uint8(weights.make(CPU).decode(mean))
    assert (space.decode(space.encode(images)).int() - expected.int()).abs().max() <= 1
    assert space.image_shape((4, 4, 4)) == (3, 8, 8)
    assert space.clip(torch.full((1,), 7.0)) == 7.0


@pytest.mark.parametrize(
    "flags",
    [
        {"kernels": "triton", "accumulate": 2},
        {"few_step": "consistency", "objective": "edm", "eval_sampler": "consistency"},
    ],
    ids=["triton", "consistency"],
)  # fmt: skip
def test_a_run_in_latents_resumes_bit_for_bit(latent, tmp_path, monkeypatch, flags):
    config = latent.replace(steps=12, eval_every=6, **flags)
    train(config)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        train(config.replace(run_root=str(tmp_path / "again")))
    assert train(recorded(tmp_path / "again" / "1"), resume=tmp_path / "again" / "1") == 0
    assert_same_run(tmp_path / "working" / "1", tmp_path / "again" / "1")


def test_classes_guidance_and_both_loaders_in_latents(latent, labelled, tmp_path):
    told = {"data": labelled("cat", "dog"), "conditional": True, "eval_guidance": 2.0, "steps": 6, "eval_every": 3}
    for root, loader in (("working", "resident"), ("dali", "dali")):
        assert train(latent.replace(**told, loader=loader, run_root=str(tmp_path / root))) == 0
    assert_same_run(tmp_path / "working" / "1", tmp_path / "dali" / "1")
    out = tmp_path / "grid.png"
    run = tmp_path / "working" / "1"
    npz = tmp_path / "images.npz.npz"
    assert call(
        "sample", "--checkpoint", run, "--steps", 2, "--guidance", 2, "--per-class", 2, "--out", out, "--save-npz", npz
    ) == 0  # fmt: skip
    with np.load(npz) as saved:
        assert saved["images"].shape == (4, 8, 8, 3)


def test_fixed_buffers_train_the_same_in_latents(latent, tmp_path):
    for root, graphs in (("a", True), ("b", False)):
        train(latent.replace(steps=8, run_root=str(tmp_path / root), graphs=graphs))
    assert_same_run(tmp_path / "a" / "1", tmp_path / "b" / "1")


def test_another_or_a_missing_autoencoder_is_refused(latent, autoencoder, trained, tmp_path, monkeypatch, capsys):
    train(latent)
    run = tmp_path / "working" / "1"
    sample = ("sample", "--checkpoint", run, "--n", 1, "--steps", 1, "--out", tmp_path / "one.png")
    moved = trained.rename(tmp_path / "moved")
    assert call(*sample) == 0  # the run keeps a copy
    shutil.rmtree(run / "autoencoder")
    capsys.readouterr()
    assert call(*sample) == 1
    assert "is not there; if it has moved, add --autoencoder" in capsys.readouterr().err
    assert call(*sample, "--autoencoder", moved) == 0
    assert train(recorded(run, steps=21, latents=str(moved)), resume=run) == 0
    assert call(*sample) == 0  # which has it again
    shutil.rmtree(run / "autoencoder")
    train(autoencoder.replace(seed=1))  # in the place of the first
    assert trained.is_dir()
    capsys.readouterr()
    assert call(*sample, "--autoencoder", trained) == 1
    assert "is another autoencoder than the one whose latents the network has learned" in capsys.readouterr().err
    with pytest.raises(UserError, match="is another autoencoder"):
        train(recorded(run, steps=22, latents=str(trained)), resume=run)
    plain = tmp_path / "plain"
    train(autoencoder.replace(autoencoder=AutoencoderConfig(), run_root=str(plain), steps=1))
    capsys.readouterr()
    assert call("sample", "--checkpoint", plain / "1", "--n", 1, "--autoencoder", trained) == 1
    assert "would decode nothing" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds a diffusion network, not an autoencoder"):
        train(latent.replace(latents=str(plain / "1")))
    with pytest.raises(UserError, match="cannot add or drop --latents"):
        train(recorded(plain / "1", latents=str(trained), steps=2), resume=plain / "1")
    for command in ("sample", "evaluate", "likelihood"):
        assert call(command, "--checkpoint", trained) == 1
        assert (
            "holds an autoencoder; a network in its latents is trained by `train_cifar.py --latents"
            in capsys.readouterr().err
        )


def test_networks_of_other_latents_do_not_mix(latent, autoencoder, trained, tmp_path):
    train(latent.replace(steps=1))
    train(autoencoder.replace(seed=1))
    other = latent.replace(
        latents=str(tmp_path / "auto" / "2"), teacher=str(tmp_path / "working" / "1"), few_step="consistency",
        objective="x0",
    )  # fmt: skip
    with pytest.raises(UserError, match="latents of"):
        train(other)
    started = latent.replace(init_from=str(tmp_path / "working" / "1"))
    assert train(started.replace(steps=1)) == 0
    with pytest.raises(UserError, match=r"was trained on latents of .* but this run trains on latents of"):
        train(started.replace(latents=str(tmp_path / "auto" / "2")))


def test_likelihood_says_that_it_is_of_latents(latent, tmp_path, capfd):
    train(latent.replace(steps=2))
    assert call("likelihood", "--checkpoint", tmp_path / "working" / "1", "--n", 2, "--steps", 3) == 0
    row = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert "bits_per_dim" not in row
    assert np.isfinite(row["bits_per_latent_dim"])


def test_flags_that_latents_set_are_not_passed_over(latent, tiny_config):
    for name, value in (("image_size", 8), ("sigma_data", 0.7)):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is {value}, but must be .*, by --latents"):
            train(latent.replace(**{name: value}))


def test_latents_that_are_not_finite_are_refused_and_not_kept(latent, trained, monkeypatch, tmp_path):
    monkeypatch.setattr(Latents, "moments", lambda self, x: torch.full((len(x), 8, 4, 4), 1e6))
    with pytest.raises(UserError, match="gives latents that are not finite"):
        train(latent)
    assert not list((tmp_path / "data").rglob("latents-*"))
    assert not (tmp_path / "working").exists()


def test_every_sampler_draws_in_latents(latent, tmp_path):
    train(latent.replace(steps=2, objective="edm"))
    loaded = load_trained(tmp_path / "working" / "1", device=CPU)
    for name in SAMPLERS:
        if name != "flow-map":  # which needs a network of two times, see below
            (images,) = loaded.generator(SamplerSettings(name, 3), batch_size=2, device=CPU).batches(2, seed=0)
            assert images.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("flags", [
    {"few_step": "flow-map", "objective": "flow", "eval_sampler": "flow-map"},
    {"few_step": "mean-flow", "objective": "flow", "eval_sampler": "flow-map"},
    {"few_step": "scm", "objective": "edm", "eval_sampler": "consistency"},
], ids=lambda flags: flags["few_step"])  # fmt: skip
def test_few_steps_are_learned_in_latents(latent, flags):
    assert train(latent.replace(steps=2, eval_every=2, **flags)) == 0

"""Runs of autoencoders, and of networks in their latents."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.config import Config
from fastdiff.data.datasets import load_dataset
from fastdiff.data.loaders import make_loader
from fastdiff.data.pixels import normalize, to_uint8
from fastdiff.errors import UserError
from fastdiff.evaluation.evaluate import load_trained
from fastdiff.evaluation.generate import SamplerSettings
from fastdiff.evaluation.space import Latents
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.nets.autoencoder import Autoencoder
from fastdiff.runs import checkpoint
from fastdiff.runs.latents import autoencoder_weights, with_latents
from fastdiff.training import moments as moments_module
from fastdiff.training.moments import latent_moments
from fastdiff.training.train import train
from tests.configs import small_config
from tests.evaluation.commands import call
from tests.training.runs import assert_same_run, rows_of, stop_at

pytestmark = pytest.mark.usefixtures("no_pictures")
SHAPE = AutoencoderConfig(factor=2, base_channels=8, blocks=1)
AUTOENCODER = {"root": "auto", "autoencoder": SHAPE, "eval_steps": 50, "steps": 10, "eval_samples": 50}
CPU = torch.device("cpu")


@pytest.fixture
def autoencoder(tiny_config, tmp_path):
    """The config of a run that trains an autoencoder."""
    return tiny_config(**AUTOENCODER)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with such a run, which takes a second to train."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiff.reporting.plots.plot_run", lambda *arguments, **options: None)
        assert train(small_config(folder, **AUTOENCODER)) == 0
    return folder / "auto"


@pytest.fixture
def trained(made, tmp_path):
    """Such a run."""
    shutil.copytree(made, tmp_path / "auto")
    return tmp_path / "auto" / "1"


@pytest.fixture
def latent(tiny_config, trained):
    """The config of a run in its latents."""
    return tiny_config(latents=str(trained), image_size=4, steps=20)


def recorded(run, **flags):
    """The config that --resume begins with."""
    return Config.from_dict(json.loads((run / "config.json").read_text())).replace(**flags)


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
def test_an_autoencoder_resumes_bit_for_bit(autoencoder, tmp_path, monkeypatch, flags):
    config = autoencoder.replace(eval_every=5, **flags)
    train(config)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        train(config.replace(run_root=str(tmp_path / "again")))
    again = config.replace(run_root=str(tmp_path / "again"))
    assert train(again, resume=tmp_path / "again" / "1") == 0
    assert_same_run(tmp_path / "auto" / "1", tmp_path / "again" / "1")


def test_an_autoencoder_may_start_from_another_of_its_shape_only(autoencoder, trained, tiny_config, tmp_path):
    config = autoencoder.replace(init_from=str(trained), steps=1, lr=1e-9, ema_decay=0.0)
    assert train(config) == 0
    before, after = (checkpoint.load_latest(tmp_path / "auto" / n / "checkpoints").state["ema"] for n in "12")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    for wrong, message in (
        (config.replace(base_channels=16), "has --base-channels 8, but this run has 16; add --base-channels 8"),
        (tiny_config(init_from=str(trained)), "holds an autoencoder of factor 2, but this run trains a network"),
    ):
        with pytest.raises(UserError, match=message):
            train(wrong)


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
        assert "holds an autoencoder, not a diffusion network" in capsys.readouterr().err


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


@pytest.mark.parametrize("conditional", [False, True])
def test_diffusers_draws_what_we_draw_in_latents(latent, labelled, tmp_path, conditional):
    """The pipeline's autoencoder takes mean and standard deviation into its own convolutions."""
    from diffusers import DiffusionPipeline

    data = {"data": labelled("cat", "dog"), "conditional": True} if conditional else {}
    train(latent.replace(steps=3, objective="v", **data))
    run, out = tmp_path / "working" / "1", tmp_path / "exported"
    assert call("export", "--checkpoint", run, "--out", out) == 0
    pipeline = DiffusionPipeline.from_pretrained(out, custom_pipeline=str(out), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    told = {"class_labels": [1, 0]} if conditional else {"batch_size": 2}
    theirs = pipeline(**told, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np")
    assert theirs.images.shape == (2, 8, 8, 3)

    # The same noise through our denoiser and decoder, by diffusers' scheduler.
    loaded = load_trained(run, device=CPU)
    generator, scheduler = torch.Generator().manual_seed(0), pipeline.scheduler
    x = torch.randn(2, 4, 4, 4, generator=generator)
    scheduler.set_timesteps(5)
    cond = {"labels": torch.tensor([1, 0])} if conditional else {}
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(loaded.network(x, t.expand(2), **cond), t, x, generator=generator).prev_sample
    ours = loaded.space.decode(x).permute(0, 2, 3, 1).numpy() / 255
    np.testing.assert_allclose(theirs.images, ours, atol=0.6 / 255)
    assert scheduler.config.clip_sample is False


@pytest.mark.parametrize("critic", [0.0, 0.5])
def test_an_autoencoder_is_exported_and_taken_back(autoencoder, latent, trained, tmp_path, critic):
    if critic:
        train(autoencoder.replace(critic_weight=critic, steps=1))
        trained = tmp_path / "auto" / "2"
        latent = latent.replace(latents=str(trained))
    folders = {kind: tmp_path / kind for kind in ("diffusers", "safetensors")}
    for kind, folder in folders.items():
        assert call("export", "--checkpoint", trained, "--out", folder, "--to", kind) == 0
    expected = autoencoder_weights(latent, {})
    for folder in folders.values():
        found = autoencoder_weights(latent.replace(latents=str(folder)), {})
        assert found.state.keys() == expected.state.keys()
        assert not any(name.startswith("critic.") for name in found.state)
        assert (found.sha256 == expected.sha256) == (folder.name == "safetensors")
        images = torch.from_numpy(load_dataset(latent.images.data, image_size=8).images)
        ours, theirs = (Latents(each.make(CPU)) for each in (expected, found))
        torch.testing.assert_close(theirs.encode(images), ours.encode(images))
        assert torch.equal(theirs.decode(ours.encode(images)), ours.decode(ours.encode(images)))
        if folder.name == "diffusers":  # whose latents are normalised by its own convolutions
            assert not theirs.mean.any()
            assert (theirs.std == 1).all()
        assert train(latent.replace(latents=str(folder), steps=1)) == 0


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


def test_a_tiny_autoencoder_of_diffusers_serves_too(tiny_config, tmp_path, capsys):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    theirs = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "tiny")
    config = tiny_config(latents=str(tmp_path / "tiny"), image_size=4, steps=2)
    with pytest.raises(UserError, match="--pixels is 0, but must be given"):
        train(config)
    assert train(config.replace(pixels=8)) == 0
    run = tmp_path / "working" / "1"
    space = load_trained(run, device=CPU).space
    images = torch.from_numpy(load_dataset(config.images.data, image_size=8).images[:3])
    with torch.no_grad():
        z = theirs.encode(normalize(images)).latents
        expected = to_uint8(theirs.decode(z).sample)
    assert (space.decode(space.encode(images)).int() - expected.int()).abs().max() <= 1
    capsys.readouterr()
    assert call("export", "--checkpoint", run, "--out", tmp_path / "out") == 1
    assert "AutoencoderTiny cannot be exported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for folder, code in ((run / "autoencoder", 0), (tmp_path / "tiny", 1)):  # of two copies one suffices
        file = folder / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        assert call("sample", "--checkpoint", run, "--n", 1, "--out", tmp_path / "a.png") == code
    assert "cannot be read as tensors" in capsys.readouterr().err


def test_an_autoencoder_that_was_never_measured_is_refused(autoencoder, latent, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        train(autoencoder.replace(run_root=str(tmp_path / "early"), save_every=5))
    with pytest.raises(UserError, match="has not been evaluated yet"):
        train(latent.replace(latents=str(tmp_path / "early" / "1")))


def test_flags_that_latents_set_are_not_passed_over(latent, tiny_config):
    for name, value in (("image_size", 8), ("sigma_data", 0.7)):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is {value}, but must be .*, by --latents"):
            train(latent.replace(**{name: value}))


def test_an_export_carries_its_autoencoder(latent, trained, tmp_path, monkeypatch):
    train(latent.replace(steps=1))
    assert (
        call("export", "--checkpoint", tmp_path / "working" / "1", "--out", tmp_path / "out", "--to", "safetensors")
        == 0
    )
    shutil.rmtree(trained)
    shutil.rmtree(tmp_path / "working")
    monkeypatch.chdir(tmp_path)
    assert call("sample", "--checkpoint", tmp_path / "out", "--n", 1, "--steps", 1) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": "4"}, "latent_channels is '4', but must be a number above 0"),
        ({"layers_per_block": None}, "layers_per_block is None"),
        ({"sample_size": -8}, "sample_size is -8"),
        ({"block_out_channels": [8]}, "must list the channels of two to five resolutions"),
        ({"block_out_channels": [6, 12]}, "block_out_channels begins with 6"),
        ({"block_out_channels": [8, 24]}, r"block_out_channels is \[8, 24\], but our autoencoder has \[8, 16\]"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"shift_factor": "x"}, "shift_factor is 'x'"),
    ],
)
def test_a_foreign_autoencoder_that_ours_cannot_be_is_named(trained, latent, tmp_path, changes, message):
    folder = tmp_path / "kl"
    assert call("export", "--checkpoint", trained, "--out", folder) == 0
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(UserError, match=message):
        autoencoder_weights(latent.replace(latents=str(folder)), {})

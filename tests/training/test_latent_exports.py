"""Autoencoders and latent networks from and to other programs."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff.data.datasets import load_dataset
from fastdiff.data.pixels import normalize, to_uint8
from fastdiff.errors import UserError
from fastdiff.evaluation.evaluate import load_trained
from fastdiff.evaluation.space import Latents
from fastdiff.runs.latents import autoencoder_weights
from fastdiff.training.train import train
from tests.evaluation.commands import call
from tests.training.runs import CPU

pytestmark = pytest.mark.usefixtures("no_pictures")


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
    settings = json.loads((tmp_path / "tiny" / "config.json").read_text())
    scaled = shutil.copytree(tmp_path / "tiny", tmp_path / "scaled")
    (scaled / "config.json").write_text(json.dumps(settings | {"scaling_factor": 0.5}))
    capsys.readouterr()
    assert call("sample", "--checkpoint", run, "--n", 1, "--autoencoder", scaled, "--out", tmp_path / "a.png") == 1
    assert "is another autoencoder" in capsys.readouterr().err
    assert call("export", "--checkpoint", run, "--out", tmp_path / "out") == 1
    assert "AutoencoderTiny cannot be exported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for folder, code in ((run / "autoencoder", 0), (tmp_path / "tiny", 1)):  # of two copies one suffices
        file = folder / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        assert call("sample", "--checkpoint", run, "--n", 1, "--out", tmp_path / "a.png") == code
    assert "cannot be read as tensors" in capsys.readouterr().err


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


def test_older_and_newer_layouts_of_diffusers_are_read(trained, latent, tmp_path):
    """Attention of 1x1 convolutions under its old names, and no convolutions beside the latents."""
    folder = tmp_path / "kl"
    assert call("export", "--checkpoint", trained, "--out", folder) == 0
    file = folder / "diffusion_pytorch_model.safetensors"
    expected, state = autoencoder_weights(latent.replace(latents=str(folder)), {}), load_file(file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in list(state):
        for new, was in old.items():
            if f"attentions.0.{new}." in name:
                value = state.pop(name)
                state[name.replace(new, was)] = value[:, :, None, None] if value.ndim == 2 else value
    save_file(state, file)
    assert autoencoder_weights(latent.replace(latents=str(folder)), {}).sha256 == expected.sha256

    settings = json.loads((folder / "config.json").read_text()) | {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({name: v for name, v in state.items() if "quant_conv" not in name}, file)
    found = autoencoder_weights(latent.replace(latents=str(folder)), {})
    images = torch.randn(2, 3, 8, 8)
    model, plain = found.make(CPU), expected.make(CPU)
    with torch.no_grad():
        whole = plain.encoder.conv_moments(torch.cat(model.encode(images), 1))
        assert torch.equal(whole.chunk(2, 1)[0], plain.encode(images)[0])

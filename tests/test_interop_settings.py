import inspect
import json
import os
import pickle
import re

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff.config import Config
from fastdiff.errors import UserError
from fastdiff.interop import (
    unet_config_to_diffusers,
    unet_from_diffusers,
)
from fastdiff.interop_settings import DEFAULTS, trained_as
from tests.test_interop import SMALL, randomize


def saved_unet(folder, **changes):
    """A random UNet2DModel of the given settings, saved in `folder`."""
    theirs = randomize(diffusers.UNet2DModel(**{**unet_config_to_diffusers(SMALL), **changes}))
    theirs.save_pretrained(folder)
    return theirs


def edit_settings(folder, *, drop=(), **changes):
    path = folder / "config.json"
    settings = {name: v for name, v in json.loads(path.read_text()).items() if name not in drop}
    path.write_text(json.dumps({**settings, **changes}))


def assert_same_network(ours, theirs):
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 977])
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x, t), theirs.eval()(x, t).sample, rtol=1e-5, atol=1e-5)


def test_the_table_of_defaults_is_diffusers():
    parameters = inspect.signature(diffusers.UNet2DModel.__init__).parameters.values()
    theirs = {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in parameters}
    assert {name: default for name, default in theirs.items() if name != "self"} == DEFAULTS


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("old_names", [False, True])
def test_old_names_of_attention_and_pickled_weights_are_read(tmp_path, suffix, old_names):
    theirs = saved_unet(tmp_path)
    state = theirs.state_dict()
    if old_names:  # as in google/ddpm-cifar10-32
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        state = {re.sub(r"to_(q|k|v|out\.0)", lambda m: old[m[0]], name): value for name, value in state.items()}
        assert "mid_block.attentions.0.proj_attn.bias" in state
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    path = tmp_path / f"diffusion_pytorch_model.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    assert_same_network(unet_from_diffusers(tmp_path), theirs)


def test_half_precision_weights_are_read(tmp_path):
    theirs = saved_unet(tmp_path).half()
    theirs.save_pretrained(tmp_path)
    assert_same_network(unet_from_diffusers(tmp_path), theirs.float())


def test_absent_settings_have_the_defaults_of_diffusers(tmp_path):
    theirs = saved_unet(tmp_path, norm_eps=1e-5)
    edit_settings(
        tmp_path, drop=("norm_eps", "act_fn", "dropout", "add_attention", "mid_block_type", "num_class_embeds")
    )
    ours = unet_from_diffusers(tmp_path)
    assert ours.config.norm_eps == 1e-5
    assert_same_network(ours, theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_size": [16, 16]},
        {"sample_size": None},
        {"attn_norm_num_groups": 4},  # that of the other norms
        {"act_fn": "swish"},
        {"time_embedding_dim": 64},
        {"num_train_timesteps": 500},
        {"decay": 0.999, "optimization_step": 7, "_name_or_path": "somewhere"},
        {"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D", "UNetResAttnDownBlock2D"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_change_nothing_are_read(tmp_path, changes):
    theirs = saved_unet(tmp_path)
    edit_settings(tmp_path, **changes)
    ours = unet_from_diffusers(tmp_path, image_size=16)
    assert_same_network(ours, theirs)
    assert_same_network(ours, diffusers.UNet2DModel.from_pretrained(tmp_path))  # as diffusers itself reads it


def test_one_head_by_its_width_is_read(tmp_path):
    theirs = saved_unet(tmp_path, block_out_channels=(16, 32, 32), attention_head_dim=32)
    assert_same_network(unet_from_diffusers(tmp_path), theirs)


REFUSED = [
    {"attn_norm_num_groups": 2}, {"attention_head_dim": 8}, {"flip_sin_to_cos": True}, {"freq_shift": 0},
    {"downsample_padding": 1}, {"resnet_time_scale_shift": "ada_group"}, {"downsample_type": "resnet"},
    {"upsample_type": "resnet"}, {"add_attention": False}, {"mid_block_type": None}, {"mid_block_scale_factor": 2},
    {"class_embed_type": "timestep"}, {"time_embedding_type": "fourier"},
    {"time_embedding_dim": 32}, {"center_input_sample": True}, {"act_fn": "gelu"}, {"out_channels": 6},
    {"sample_size": [16, 32]}, {"block_out_channels": [16, 24, 48]}, {"layers_per_block": 2.0},
    {"up_block_types": ["UpBlock2D", "UpBlock2D", "UpBlock2D"]}, {"down_block_types": ["DownBlock2D"]},
    {"down_block_types": None}, {"norm_eps": "1e-6"}, {"norm_num_groups": None}, {"block_out_channels": []},
    {"a_setting_of_tomorrow": 1}, {"_class_name": "UNet2DConditionModel"},
]  # fmt: skip


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_settings_that_we_cannot_have_are_refused(tmp_path, changes):
    saved_unet(tmp_path)
    edit_settings(tmp_path, **changes)
    with pytest.raises(UserError) as refused:
        unet_from_diffusers(tmp_path)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert re.search("|".join([*changes, "no UNet2DModel", "UNet2DConditionModel"]), str(refused.value))


def test_an_open_size_is_asked_for(tmp_path):
    saved_unet(tmp_path)
    edit_settings(tmp_path, sample_size=None)
    with pytest.raises(UserError, match="leaves sample_size open; give its image_size"):
        unet_from_diffusers(tmp_path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def damage(folder, how):
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    pickled = folder / "diffusion_pytorch_model.bin"
    if how == "no config":
        config.unlink()
    elif how == "truncated config":
        config.write_text(config.read_text()[:100])
    elif how == "config of another kind":
        config.write_text("[1, 2]")
    elif how == "config not of text":
        config.write_bytes(b"\xff\xfe\x00")
    elif how == "nested config":
        config.write_text("[" * 100_000)
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "weights of another shape":
        save_file({**load_file(weights), "conv_in.bias": torch.zeros(3)}, weights)
    elif how == "integer weights":
        save_file({**load_file(weights), "conv_in.bias": torch.zeros(16, dtype=torch.int64)}, weights)
    elif how == "missing weights":
        save_file({name: v for name, v in load_file(weights).items() if name != "conv_in.bias"}, weights)
    elif how == "both names":
        state = load_file(weights)
        save_file(
            {**state, "mid_block.attentions.0.query.bias": state["mid_block.attentions.0.to_q.bias"] + 1}, weights
        )
    else:
        state = load_file(weights)
        weights.unlink()
        if how == "harmful pickle":
            pickled.write_bytes(pickle.dumps(Evil()))
        elif how == "harmful archive":
            torch.save({**state, "conv_in.bias": Evil()}, pickled)
        elif how == "truncated archive":
            torch.save(state, pickled)
            pickled.write_bytes(pickled.read_bytes()[:-1000])
        elif how == "pickled list":
            torch.save([1, 2], pickled)
        elif how == "pickled numbers":
            torch.save({**state, "conv_in.bias": 3.0}, pickled)
        elif how == "text":
            pickled.write_text("version https://git-lfs.github.com/spec/v1")
        else:
            assert how == "no weights"


DAMAGES = [
    "no config", "truncated config", "config of another kind", "config not of text", "nested config",
    "truncated weights", "empty weights", "weights of another shape", "integer weights", "missing weights",
    "both names", "harmful pickle", "harmful archive", "truncated archive", "pickled list", "pickled numbers", "text",
    "no weights",
]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_folder_is_one_line(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    saved_unet(tmp_path / "unet")
    damage(tmp_path / "unet", how)
    with pytest.raises(UserError) as refused:
        unet_from_diffusers(tmp_path)
    assert "\n" not in str(refused.value)
    assert str(tmp_path / "unet") in str(refused.value)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Config().diffusion.task),
        ({"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
         Config.of(objective="v", schedule="cosine", timesteps=100).diffusion.task),
        ({"prediction_type": "sample", "rescale_betas_zero_snr": True},
         Config.of(objective="x0", zero_terminal_snr=True).diffusion.task),
        ({"beta_end": 0.012}, "eps on other betas (linear), 1000 timesteps"),
        ({"trained_betas": [0.1, 0.2]}, "eps on other betas (linear), 1000 timesteps"),
    ],
)  # fmt: skip
def test_what_a_pipeline_was_trained_for_is_said_in_our_words(settings, expected):
    assert trained_as({"_class_name": "DDPMScheduler", **settings}) == expected

"""`--init-from`: a new run that starts from the averaged weights of another network."""

import dataclasses
import os
import shutil

import diffusers
import pytest
import torch

from fastdiff.config import Config
from fastdiff.errors import UserError
from fastdiff.evaluation.commands import export
from fastdiff.evaluation.evaluate import load_trained
from fastdiff.flags import Export
from fastdiff.interop import unet_config_to_diffusers, unet_from_diffusers
from fastdiff.runs import checkpoint
from fastdiff.runs.weights import initial_weights, teacher_weights
from fastdiff.training.train import train
from tests.configs import TINY

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def source(tiny_config, tmp_path):
    """A finished run of eps on ddpm-linear, and its averaged weights."""
    train(tiny_config(steps=3, run_root=str(tmp_path / "source")))
    run = tmp_path / "source" / "1"
    return run, checkpoint.load_latest(run / "checkpoints").state["ema"]


def start(config):
    """The first checkpoint of a run whose one step changes no weight."""
    train(config.replace(lr=1e-30, steps=1))
    runs = sorted(os.listdir(config.run.run_root), key=int)
    return checkpoint.load_latest(f"{config.run.run_root}/{runs[-1]}/checkpoints")


def assert_weights(saved, expected):
    for part in ("model", "ema"):
        assert saved.state[part].keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in saved.state[part].items())


def diffusers_folder(folder, **changes):
    torch.manual_seed(1)
    settings = unet_config_to_diffusers(TINY) | changes
    theirs = diffusers.UNet2DModel(**settings)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("kind", ["run", "checkpoint", "safetensors", "diffusers"])
def test_a_new_run_starts_from_what_was_saved(source, tiny_config, tmp_path, capsys, kind):
    run, weights = source
    path = {"run": run, "checkpoint": run / "checkpoints" / "step-3"}.get(kind, tmp_path / "exported")
    if kind in ("safetensors", "diffusers"):
        export(Export(checkpoint=run, out=path, to=kind))
    capsys.readouterr()
    saved = start(tiny_config(init_from=str(path)))
    assert saved.step == 1
    assert_weights(saved, weights)
    assert saved.state["config"]["optim"]["init_from"] == str(path)
    out = " ".join(capsys.readouterr().out.split())
    assert f"weights from {path}" in out
    assert "trained as eps on ddpm-linear, 100 timesteps" in out
    assert "this run trains" not in out
    steps = {int(state["step"]) for state in saved.state["optimizer"]["state"].values()}
    assert steps == {1}  # the optimizer is a new one


def test_a_network_that_diffusers_made_is_trained_on(tiny_config, tmp_path):
    diffusers_folder(tmp_path / "unet", sample_size=None)  # whose size then is --image-size
    expected = unet_from_diffusers(tmp_path / "unet", image_size=8).state_dict()
    assert_weights(start(tiny_config(init_from=str(tmp_path / "unet"))), expected)


def test_a_resumed_run_reads_its_own_weights(source, tiny_config, tmp_path):
    run, _ = source
    whole, cut = (tiny_config(init_from=str(run), run_root=str(tmp_path / name)) for name in ("whole", "cut"))
    train(whole.replace(steps=6))
    train(cut.replace(steps=4))
    shutil.rmtree(run)
    train(cut.replace(steps=6), resume=tmp_path / "cut" / "1")
    one, other = (checkpoint.load_latest(tmp_path / name / "1" / "checkpoints").state for name in ("whole", "cut"))
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    with pytest.raises(UserError, match="cannot change what is trained: --init-from was"):
        train(cut.replace(steps=8, init_from="elsewhere"), resume=tmp_path / "cut" / "1")


def test_runs_from_before_have_no_such_field(tiny_config):
    values = tiny_config().to_dict()
    del values["optim"]["init_from"]
    assert Config.from_dict(values) == tiny_config()


def test_another_task_is_told_and_trained(source, tiny_config, capsys):
    run, weights = source
    saved = start(tiny_config(init_from=str(run), objective="v", schedule="cosine"))
    assert_weights(saved, weights)
    out = " ".join(capsys.readouterr().out.split())
    assert (
        f"warning --init-from {run} was trained as eps on ddpm-linear, 100 timesteps, but this run trains v on cosine, "
        "100 timesteps."
    ) in out


def test_another_time_scale_is_refused(source, tiny_config, tmp_path):
    run, _ = source
    with pytest.raises(UserError, match=r"with --time-scale 1, but this run has 0\.01.*; add --time-scale 1"):
        initial_weights(tiny_config(init_from=str(run), time_scale=0.01))
    diffusers_folder(tmp_path / "unet")
    with pytest.raises(UserError, match="add --time-scale 1"):
        initial_weights(tiny_config(init_from=str(tmp_path / "unet"), time_scale=0.01))


def test_a_teacher_is_where_a_student_starts_and_of_its_task(tiny_config, tmp_path):
    train(tiny_config(objective="v", steps=1))
    run = tmp_path / "working" / "1"
    config = tiny_config(teacher=str(run), few_step="consistency", objective="v")
    weights = checkpoint.load_latest(run / "checkpoints").state["ema"]
    for found in (initial_weights(config), teacher_weights(config, {})):
        assert all(torch.equal(found.state[name], value) for name, value in weights.items())
    with pytest.raises(UserError, match=r"was trained as v on ddpm-linear.* but this run trains edm on edm"):
        teacher_weights(tiny_config(teacher=str(run), few_step="consistency", objective="edm"), {})


def test_a_flow_map_teaches_guides_and_starts_only_its_like(tiny_config, tmp_path):
    flow = {"objective": "flow", "schedule": "flow", "steps": 1}
    train(tiny_config(few_step="flow-map", run_root=str(tmp_path / "map"), **flow))
    train(tiny_config(run_root=str(tmp_path / "plain"), **flow))
    run, plain = (str(tmp_path / name / "1") for name in ("map", "plain"))
    with pytest.raises(UserError, match=r"--teacher .* was trained with --few-step flow-map, which leaves no flow"):
        teacher_weights(tiny_config(teacher=run, few_step="consistency", **flow), {})
    with pytest.raises(
        UserError, match="was trained for two times; only --few-step flow-map and mean-flow can start from it"
    ):
        initial_weights(tiny_config(init_from=run, **flow))
    guide, guided = (load_trained(path, device=torch.device("cpu")) for path in (run, plain))
    assert guide.config.task != guided.config.task


def test_another_kind_of_norm_is_named_by_its_flag(source, tiny_config):
    run, _ = source
    net = dataclasses.replace(TINY, norm_conditioning=True)
    with pytest.raises(UserError, match=r"Add --no-norm-conditioning\.$"):
        initial_weights(tiny_config(init_from=str(run), net=net))


def test_another_dropout_is_no_other_shape(source, tiny_config):
    run, weights = source
    config = tiny_config(init_from=str(run), net=dataclasses.replace(TINY, dropout=0.0))
    assert all(torch.equal(value, weights[name]) for name, value in initial_weights(config).state.items())


def test_another_shape_is_named_with_its_remedy(source, tiny_config, tmp_path):
    run, _ = source
    net = dataclasses.replace(TINY, channel_mult=(1, 1), norm_groups=2, attention_resolutions=(8, 4))
    config = tiny_config(init_from=str(run), net=net, run_root=str(tmp_path / "new"))
    with pytest.raises(UserError) as refused:
        train(config)
    assert "--channel-mult is (1, 1) here, (1, 2) there; " in str(refused.value)
    assert "Add --channel-mult 1 2 --attention-resolutions 4 --norm-groups 4." in str(refused.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is no folder; name a run, a checkpoint, a folder of `export`, or one of a diffusers"),
        (lambda path: path.mkdir(), "config.json is missing; expected the folder of a diffusers pipeline or model"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "has no checkpoint yet"),
        (lambda path: diffusers_folder(path, norm_eps=1e-5), "--norm-eps is 1e-06 here, 1e-05 there. Add --norm-eps"),
        (lambda path: diffusers_folder(path, attn_norm_num_groups=2), "attn_norm_num_groups = 2"),
    ],
)
def test_what_cannot_be_read_leaves_no_run(tiny_config, tmp_path, make, message):
    make(tmp_path / "source")
    with pytest.raises(UserError) as refused:
        train(tiny_config(init_from=str(tmp_path / "source")))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "working").exists()


def test_an_empty_name_is_refused(tiny_config):
    with pytest.raises(UserError, match="--init-from is ''"):
        tiny_config(init_from="")


def test_it_is_a_flag():
    from train_cifar import parse

    assert parse(["--init-from", "working/1"]).config == Config.of(init_from="working/1")

"""`python -m fastdiff export`: what it writes, and what is read back from it."""

import json
import os
import re

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff.config import Config
from fastdiff.evaluation.evaluate import load_trained
from fastdiff.nets.unet import UNet
from fastdiff.runs import checkpoint
from tests.evaluation.commands import call


def test_export_to_diffusers_loads_as_a_pipeline(run, tmp_path):
    assert call("export", "--checkpoint", run, "--to", "diffusers", "--out", tmp_path / "out") == 0
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    ours = load_trained(run, device=torch.device("cpu")).model
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 80])
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet.eval()(x, t).sample, ours(x, t), rtol=1e-5, atol=1e-5)
    assert pipeline.scheduler.config.num_train_timesteps == 100


def test_a_consistency_model_is_exported_only_where_diffusers_draws_as_it_does(run, tmp_path, capsys):
    state = checkpoint.load(run / "checkpoints" / "step-2").state
    for objective, few_step in (("x0", "consistency"), ("edm", "scm"), ("v", "consistency")):
        config = Config.from_dict(state["config"]).replace(objective=objective, few_step=few_step, boundary=0.02)
        checkpoint.save(run / "checkpoints", 3, {**state, "config": config.to_dict()})
        trained = load_trained(run, device=torch.device("cpu"))
        assert getattr(trained.objective, "boundary", 0) == (0.02 if objective == "x0" else 0)
        out = tmp_path / objective
        assert call("export", "--checkpoint", run, "--to", "diffusers", "--out", out) == (objective != "v")
        assert out.exists() == (objective == "v")
    assert "do not add x_t to its estimates, as it has learned" in capsys.readouterr().err


def test_export_to_safetensors_rebuilds_the_network(run, tmp_path):
    assert call("export", "--checkpoint", run, "--to", "safetensors", "--out", tmp_path / "out") == 0
    config = Config.from_dict(json.loads((tmp_path / "out" / "config.json").read_text()))
    model = UNet(config.net)
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("to", ["safetensors", "diffusers"])
def test_permissions_are_as_the_umask_has_them(run, tmp_path, modes, to):
    (tmp_path / "there").mkdir()
    for out in ("new", "there"):
        assert call("export", "--checkpoint", run, "--to", to, "--out", tmp_path / out) == 0
        assert modes(tmp_path / out) - {"0o770"} == {"0o660"}
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o770


def test_an_exported_folder_stands_for_its_checkpoint(run, tmp_path, capsys):
    out = run / "exports" / "weights"  # within a run, whose own checkpoint it is not
    assert call("export", "--checkpoint", run, "--to", "safetensors", "--out", out) == 0
    for name, checkpoint_ in (("run", run), ("export", out)):
        common = ("--steps", 3, "--n", 4)
        assert call("sample", "--checkpoint", checkpoint_, *common, "--out", tmp_path / f"{name}.png") == 0
        assert call("export", "--checkpoint", checkpoint_, "--out", tmp_path / f"{name}-diffusers") == 0
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "export.png").read_bytes()
    weights = "unet/diffusion_pytorch_model.safetensors"
    first, second = (tmp_path / f"{name}-diffusers" / weights for name in ("run", "export"))
    assert first.read_bytes() == second.read_bytes()
    capsys.readouterr()
    assert call("likelihood", "--checkpoint", out, "--n", 2, "--steps", 2) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["step"], row["checkpoint"]) == (2, "weights")


def test_evaluate_of_an_exported_folder_is_not_recorded(run, capsys):
    pytest.importorskip("efficientnet_lite_pytorch")
    out = run / "exports" / "weights"
    assert call("export", "--checkpoint", run, "--to", "safetensors", "--out", out) == 0
    before = sorted(run.rglob("*")), (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    common = ("--n", 6, "--steps", 2, "--feature-size", 32, "--features", "efficientnet_lite0")
    assert call("evaluate", "--checkpoint", out, *common) == 0
    said = capsys.readouterr()
    row = json.loads(said.out)
    assert (row["step"], row["images"], row["checkpoint"]) == (2, 256, "weights")
    assert f"{out} lies in no run, so that the row is not recorded" in said.err
    assert (sorted(run.rglob("*")), (run / "metrics.jsonl").read_bytes()) == before


def no_step(out):
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors")


def another_shape(out):
    config = json.loads((out / "config.json").read_text())
    config["net"]["channels"] = 16
    (out / "config.json").write_text(json.dumps(config))


def cut(name):
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_step, "no folder of `export --to safetensors`: model.safetensors does not say"),
        (another_shape, "the weights do not fit the network's shape: conv_in.bias is .8,., not .16,."),
        (cut("model.safetensors"), "model.safetensors cannot be read as tensors"),
        (cut("config.json"), "config.json cannot be read as JSON"),
        (lambda out: (out / "config.json").write_text('{"net": 3}'), "is no folder of"),
        (lambda out: (out / "config.json").write_text('{"tomorrow": 3}'), "fields that this version does not know"),
    ],
)
def test_a_damaged_export_is_one_line(run, tmp_path, capsys, damage, message):
    out = tmp_path / "weights"
    assert call("export", "--checkpoint", run, "--to", "safetensors", "--out", out) == 0
    damage(out)
    capsys.readouterr()
    assert call("sample", "--checkpoint", out, "--n", 1, "--out", tmp_path / "grid.png") == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search(message, error)


@pytest.mark.parametrize("to", ["diffusers", "safetensors"])
def test_export_fills_an_empty_folder(run, tmp_path, monkeypatch, to):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert call("export", "--checkpoint", run, "--to", to, "--out", ".") == 0
    assert call("export", "--checkpoint", run, "--to", to, "--out", tmp_path / "new") == 0

    def content(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert content(tmp_path / "empty") == content(tmp_path / "new")
    assert sorted(os.listdir()) == sorted(os.listdir(tmp_path / "new"))


def test_an_export_that_fails_leaves_an_empty_folder_empty(run, tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("fastdiff.evaluation.exporting.write_atomically", full)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new"):
        assert call("export", "--checkpoint", run, "--to", "safetensors", "--out", out) == 1
        assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "new").exists()

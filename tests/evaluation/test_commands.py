import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastdiff.cli import run_command
from fastdiff.config import Config
from fastdiff.diffusion.objectives import Objective
from fastdiff.errors import TrainingFailed, UserError
from fastdiff.evaluation.evaluate import load_trained
from fastdiff.nets.unet import UNet
from fastdiff.reporting import plots
from fastdiff.runs import checkpoint
from fastdiff.runs.data import load_run_data
from fastdiff.runs.files import write_atomically
from fastdiff.runs.run import open_run
from tests.evaluation.commands import NET, call


def test_a_step_can_be_named_and_a_run_means_its_newest(run):
    device = torch.device("cpu")
    newest, first = load_trained(run, device=device), load_trained(run / "checkpoints" / "step-1", device=device)
    assert (newest.step, first.step) == (2, 1)
    torch.manual_seed(2)
    UNet(NET), UNet(NET)
    saved = load_file(run / "checkpoints" / "step-2" / "ema.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in newest.model.state_dict().items())
    assert not newest.model.training


def test_the_network_runs_by_the_kernels_that_trained_it(run):
    """`auto` means by PyTorch on a CPU, as in training."""
    path, fused = run / "checkpoints" / "step-2", []
    state = checkpoint.load(path).state
    for kernels in ("auto", "torch", "triton"):
        config = {**state["config"], "kernels": kernels}
        checkpoint.save(run / "checkpoints", 3, {**state, "config": config})
        trained = load_trained(run, device=torch.device("cpu"))
        fused.append(trained.network is not trained.model)
    assert fused == [False, False, True]


def test_likelihood_prints_one_json_line_and_is_deterministic(run, capsys):
    common = ("likelihood", "--checkpoint", run, "--n", 5, "--steps", 4, "--batch-size", 2)
    found = []
    for seed in (0, 0, 1):
        assert call(*common, "--seed", seed) == 0
        out, err = capsys.readouterr()
        found.append(json.loads(out))
        assert re.search(
            r"(?m)^data +images-train: 40 images of 8x8; split train: all of it; pixels 0 to 255, mean ", err
        )
    assert found[0] == found[1]
    assert found[0]["bits_per_dim"] != found[2]["bits_per_dim"]
    assert (found[0]["images"], found[0]["steps"], found[0]["data"], found[0]["step"]) == (5, 4, "images-train", 2)
    assert 4 < found[0]["bits_per_dim"] < 40  # uniform noise has 8, an untrained network more
    assert 0 < found[0]["standard_error"] < 5


def test_likelihood_agrees_with_the_closed_form(run, monkeypatch, capsys):
    """For the denoiser of standard normal data, log p is that of the normal distribution itself."""
    monkeypatch.setattr(Objective, "denoise", normal_denoise)
    assert call("likelihood", "--checkpoint", run, "--n", 40, "--steps", 30) == 0
    bits = json.loads(capsys.readouterr().out)["bits_per_dim"]
    with np.load(run.parents[1] / "images.npz") as file:
        expected = normal_bits(file["images"])
    assert bits == pytest.approx(expected, abs=0.01)


def normal_denoise(self, model, x_t, t, **cond):
    """The denoiser of standard normal data, in place of Objective.denoise."""
    a, s = self.schedule.alpha(t), self.schedule.sigma(t)
    return (a / (a**2 + s**2)).to(x_t.dtype) * x_t


def normal_bits(images):
    """Bits per dimension of images under the standard normal distribution."""
    square = ((images / 127.5 - 1) ** 2).mean() + 1 / (12 * 127.5**2)  # with the dequantisation's
    return 0.5 * (square + np.log(2 * np.pi)) / np.log(2) + np.log2(127.5)


def test_likelihood_draws_its_images_from_all(run, tmp_path, monkeypatch, capsys):
    """Of a set that is sorted by class, as folders are, the first images are unlike the whole."""
    images = np.full((200, 8, 8, 3), 128, np.uint8)
    images[100:] = 255
    np.savez(tmp_path / "sorted.npz", images=images)
    monkeypatch.setattr(Objective, "denoise", normal_denoise)
    bits = []
    for seed in (0, 1):
        common = ("--steps", 30, "--n", 40, "--seed", seed, "--data", tmp_path / "sorted.npz")
        assert call("likelihood", "--checkpoint", run, *common) == 0
        row = json.loads(capsys.readouterr().out)
        assert (row["images"], row["drawn"]) == (40, f"at random from 200, seed {seed}")
        bits.append(row["bits_per_dim"])
    assert bits == pytest.approx([normal_bits(images)] * 2, abs=0.15)
    assert abs(normal_bits(images[:40]) - normal_bits(images)) > 0.3


@pytest.mark.parametrize("compile", ["off", "on"])
def test_evaluate_prints_one_json_line_and_adds_a_row(run, capsys, monkeypatch, compile):
    pytest.importorskip("efficientnet_lite_pytorch")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net, **options: (compiled.append(net), net)[1])
    arguments = ("evaluate", "--checkpoint", run, "--n", 6, "--steps", 2, "--sampler", "ddpm", "--feature-size", 32,
                 "--features", "efficientnet_lite0", "--compile", compile)  # fmt: skip
    assert call(*arguments) == 0
    assert len(compiled) == (compile == "on")
    out, err = capsys.readouterr()
    row = json.loads(out)
    assert "data       images-train: 40 images of 8x8; " in err
    assert row["metric"] == "fd_efficientnet_lite0"
    assert (row["samples"], row["sampler"], row["sampler_steps"], row["feature_size"]) == (6, "ddpm", 2, 32)
    assert (row["step"], row["images"], row["checkpoint"], row["reference"]) == (2, 256, "step-2", "images-train")
    (logged,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged == {"kind": "eval", **row}
    assert (run / "saves" / "fid.png").exists()


def test_evaluate_measures_several_numbers_of_steps_beside_the_teacher(run, capsys, monkeypatch):
    pytest.importorskip("efficientnet_lite_pytorch")
    config = json.loads((run / "config.json").read_text())
    config["optim"]["init_from"] = str(run / "checkpoints" / "step-1")  # itself, which has rows
    config["tuning"]["few_step"] = "consistency"
    (run / "config.json").write_text(json.dumps(config))
    told = []
    monkeypatch.setattr(plots, "plot_few_steps", lambda rows, path, teacher: told.append((len(rows), len(teacher))))
    arguments = ("evaluate", "--checkpoint", run, "--n", 6, "--feature-size", 32, "--features", "efficientnet_lite0")
    assert call(*arguments, "--sampler", "consistency", "--steps", 1, 2) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["sampler_steps"] for row in rows] == [1, 2]
    assert rows[0]["value"] != rows[1]["value"]
    assert told == [(1, 1), (2, 2)]
    assert call(*arguments, "--steps", 1, 2, "--guidance", 1, 2) == 2
    assert "measure one of them at a time" in capsys.readouterr().err


def measure(run, capsys, *flags):
    """Exit code, row and messages of a cheap `evaluate`."""
    common = ("--n", 4, "--steps", 2, "--feature-size", 32, "--features", "efficientnet_lite0")
    code = call("evaluate", "--checkpoint", run, *common, *flags)
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_evaluate_records_nothing_in_a_run_in_use_and_says_so(run, capsys):
    pytest.importorskip("efficientnet_lite_pytorch")
    with open_run(run):
        for place in (run, run / "checkpoints" / "step-1"):
            code, row, err = measure(place, capsys)
            assert (code, row["metric"]) == (0, "fd_efficientnet_lite0")
            assert err.splitlines()[-1].startswith(f"not recorded in the run: {run}: in use by another process (pid")
    assert (run / "metrics.jsonl").read_text() == ""
    code, row, err = measure(run, capsys)
    assert json.loads((run / "metrics.jsonl").read_text()) == {"kind": "eval", **row}
    assert "not recorded" not in err


@pytest.fixture
def read_only():
    """Make a folder's file system read-only; root may write wherever permissions forbid it."""
    mounted = []

    def make(path):
        for command in (["mount", "--bind", path, path], ["mount", "-o", "remount,ro,bind", path]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"cannot mount: {done.stderr.strip()}")
            mounted.append(path)

    yield make
    for path in mounted[:1]:
        subprocess.run(["umount", "-l", path], check=True)


def test_every_command_reads_a_run_on_a_read_only_disk(run, tmp_path, capsys, read_only):
    pytest.importorskip("efficientnet_lite_pytorch")
    (run.parents[1] / "data").mkdir()
    disk = run.parents[1].rename(tmp_path.with_name("disk"))
    tmp_path.mkdir()
    run, data = disk / "working" / "1", ("--data", disk / "images.npz", "--data-root", disk / "data")
    read_only(disk)
    code, row, err = measure(run, capsys, *data)
    assert (code, row["step"]) == (0, 2)
    assert f"not recorded in the run: {run / 'lock'}: cannot be opened for writing (Read-only file system)" in err
    assert call("sample", "--checkpoint", run, "--n", 4, "--steps", 2, "--out", tmp_path / "a.png") == 0
    assert call("likelihood", "--checkpoint", run, "--n", 4, "--steps", 2, *data) == 0
    assert call("export", "--checkpoint", run, "--out", tmp_path / "out") == 0


def test_the_default_data_are_the_runs_whatever_the_folder(run, tmp_path, monkeypatch, capsys):
    """Other images of the same name must not be taken for them."""
    path, state = run / "checkpoints" / "step-2", checkpoint.load(run / "checkpoints" / "step-2").state
    monkeypatch.chdir(tmp_path)
    config = Config.from_dict(state["config"] | {"data": "images.npz"})
    saved = {**state, "config": config.to_dict(), **load_run_data(config, {})[1]}
    checkpoint.save(run / "checkpoints", 2, saved)
    command = ("likelihood", "--checkpoint", path, "--n", 4, "--steps", 2)
    assert call(*command) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert call(*command) == 0
    (tmp_path / "images.npz").unlink()
    assert call(*command) == 1
    np.savez("images.npz", images=np.arange(40 * 8 * 8 * 3, dtype=np.uint8).reshape(40, 8, 8, 3))
    assert call(*command) == 1
    out, err = capsys.readouterr()
    assert len(set(out.splitlines())) == 1
    missing, other = (line for line in err.splitlines() if line.startswith("error: "))
    assert "--data images.npz is not there" in missing
    assert "--data images.npz holds other images" in other


@pytest.mark.parametrize(
    ("changes", "warns"), [({}, True), ({"timesteps": 1000}, False), ({"schedule": "cosine"}, False)]
)
def test_a_schedule_that_does_not_end_in_noise_is_told_when_sampling(run, tmp_path, capsys, changes, warns):
    state = checkpoint.load(run / "checkpoints" / "step-2").state
    checkpoint.save(run / "checkpoints", 3, {**state, "config": {**state["config"], **changes}})
    assert call("sample", "--checkpoint", run, "--n", 1, "--steps", 2, "--out", tmp_path / "grid.png") == 0
    assert ("warning: ddpm-linear with T = 100 does not end in noise" in capsys.readouterr().err) == warns


MISTAKES = [
    (("sample", "--checkpoint", "nowhere"), "nowhere is neither a run directory nor a checkpoint"),
    (("sample", "--checkpoint", "{run}", "--out", "missing/grid.png"), "folder .*missing does not exist"),
    (("sample", "--checkpoint", "{run}", "--out", "/proc/grid.png"), "/proc takes no files"),
    (("sample", "--checkpoint", "{run}", "--steps", "101"), "101 sampling steps"),
    (("export", "--checkpoint", "{run}", "--out", "{run}"), "exists already"),
]
BAD_FLAGS = [
    (("sample", "--checkpoint", "{run}", "--n", "0"), "must be at least 1"),
    (("sample", "--checkpoint", "{run}", "--batch-size", "0"), "must be at least 1"),
    (("sample", "--checkpoint", "{run}", "--steps", "0"), "--steps is 0"),
    (("sample", "--checkpoint", "{run}", "--seed", "-1"), "--seed is -1"),
    (("sample", "--checkpoint", "{run}", "--eta", "1.5"), "eta is 1.5"),
    (("sample", "--checkpoint", "{run}", "--sampler", "ddpm", "--eta", "1"), "--eta belongs to ddim"),
    (("evaluate", "--checkpoint", "{run}", "--eta", "2"), "eta is 2"),
    (("evaluate", "--checkpoint", "{run}", "--n", "1"), "at least 2 samples"),
    (("sample", "--checkpoint", "{run}", "--out", "a.gif"), "a.gif ends in .gif, but pictures are written as .png"),
    (("sample", "--checkpoint", "{run}", "--out", "a.npz"), "write the images by --save-npz a.npz"),
    (("sample", "--checkpoint", "{run}", "--out", "x.npz", "--save-npz", "x.npz"), "--out and --save-npz are both"),
    (("sample", "--checkpoint", "{run}", "--out", "a.png", "--save-npz", "./b/../a.png"), "--out and --save-npz are"),
]


@pytest.mark.parametrize(
    ("arguments", "message", "status"), [(*case, 1) for case in MISTAKES] + [(*case, 2) for case in BAD_FLAGS]
)
def test_a_mistake_is_one_line_and_leaves_no_file(run, tmp_path, monkeypatch, capsys, arguments, message, status):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert call(*(a.format(run=run) for a in arguments)) == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_device_is_not_replaced_by_a_file(run, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for flags in (("--out", tmp_path / "pipe"), ("--out", tmp_path / "a.png", "--save-npz", tmp_path / "pipe")):
        assert call("sample", "--checkpoint", run, "--n", 2, "--steps", 2, *flags) == 1
        assert "pipe is no regular file" in capsys.readouterr().err
    with pytest.raises(OSError, match="is no regular file"):
        write_atomically(tmp_path / "pipe", b"")
    assert (tmp_path / "pipe").is_fifo()


def test_exit_codes(capsys):
    def fail(error):
        def command():
            raise error

        return run_command(command)

    assert run_command(lambda: 0) == 0
    assert fail(UserError("no")) == fail(TrainingFailed("nan")) == 1
    assert capsys.readouterr().err == "error: no\nerror: nan\n"
    assert fail(PermissionError(13, "Permission denied", "a/b")) == 1
    assert fail(MemoryError("Unable to allocate 8 TiB")) == fail(torch.OutOfMemoryError("CUDA out of memory.\nA")) == 1
    unwritable, *memory = capsys.readouterr().err.splitlines()
    assert unwritable == "error: a/b: Permission denied"
    assert len(memory) == 2
    assert all(line.startswith("error: not enough memory (") for line in memory)
    for error in (ZeroDivisionError(), RuntimeError("shapes differ"), OSError("of ours")):
        with pytest.raises(type(error)):
            fail(error)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("train_cifar.py", "--help"), 0),
        (("train_cifar.py", "--preset", "nonsense"), 2),
        (("train_cifar.py", "--batch-size", "many"), 2),
        (("train_cifar.py", "--batch-size", "0"), 2),
        (("train_cifar.py", "--resume", "nowhere"), 1),
        (("train_cifar.py", "--data", "nowhere"), 1),
        (("-m", "fastdiff", "--help"), 0),
        (("-m", "fastdiff", "sample", "--help"), 0),
        (("-m", "fastdiff", "sample"), 2),
        (("-m", "fastdiff", "paint"), 2),
    ],
)
def test_commands_as_a_user_types_them(repo, command, expected):
    done = subprocess.run([sys.executable, *command], cwd=repo, capture_output=True, text=True, timeout=120)
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr
    if expected == 0:
        assert "default" in done.stdout or "sample" in done.stdout
    if expected == 1:
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_flags_override_the_preset_and_the_run(tmp_path, repo, monkeypatch):
    monkeypatch.syspath_prepend(repo)
    from train_cifar import parse

    assert parse([]).config == Config()
    quick = parse(["--preset", "quick", "--lr", "0.5", "--dropout=0.25"]).config
    assert (quick.preset, quick.optim.lr, quick.net.dropout, quick.images.data) == ("quick", 0.5, 0.25, "digits")
    saved = quick.replace(steps=777)
    (tmp_path / "config.json").write_text(json.dumps(saved.to_dict()))
    for form in (["--resume", str(tmp_path)], [f"--resume={tmp_path}"]):
        flags = parse([*form, "--log-every", "3"])
        assert flags.config == saved.replace(log_every=3)
        assert flags.resume == tmp_path
    (tmp_path / "config.json").write_text('{"tomorrow": 3}')
    with pytest.raises(UserError, match=r"^config\.json has fields that this version does not know: tomorrow"):
        parse(["--resume", str(tmp_path)])

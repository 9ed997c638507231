"""fastdiff where something is missing or other than on the machine that it was written on: Triton, the repository's
folder, the name `kernels`, Linux."""

import ast
import os
import runpy
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from fastdiff.errors import UserError
from fastdiff.runtime import device as machine

TRAIN = (
    "--preset", "quick", "--data", "images.npz", "--image-size", "8", "--channels", "8", "--channel-mult", "1", "1",
    "--norm-groups", "4", "--attention-resolutions", "4", "--batch-size", "4", "--steps", "2", "--features", "none",
    "--eval-samples", "4", "--grid-samples", "4", "--eval-steps", "2", "--no-eval-at-start", "--device", "cpu",
    "--no-conditional", "--eval-guidance", "1", "--warmup-steps", "1",
)  # fmt: skip

# Runs commands, [program, *arguments] each, one after the other in one process, as torch takes seconds to import.
COMMANDS = """
import sys
{before}
from train_cifar import run as train
from fastdiff.__main__ import run as fastdiff
for command in {commands}:
    sys.argv = command
    status = train() if "train" in command[0] else fastdiff()
    print("status", status)
{after}
"""


def run_python(code, cwd, *path):
    """Run Python code in `cwd` with these folders on its path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )


def run_commands(*commands, before="", after="", cwd, path):
    np.savez(cwd / "images.npz", images=np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8))
    code = COMMANDS.format(commands=[[*map(str, command)] for command in commands], before=before, after=after)
    done = run_python(code, cwd, *path)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(repo, tmp_path_factory):
    """What `pip install .` unpacks into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=repo, check=True, capture_output=True, timeout=120)
    site = folder / "environment" / "site-packages"
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(site)
    return site


@pytest.fixture
def others(tmp_path):
    """Another package of the name `kernels`."""
    package = tmp_path / "others" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def get_kernel(): return 'theirs'\n")
    return package.parent


def test_without_triton_all_commands_run_on_the_references(repo, tmp_path):
    out = ("--checkpoint", "working/1")
    done = run_commands(
        ("train_cifar.py", *TRAIN),
        ("fastdiff", "sample", *out, "--n", 2, "--steps", 2, "--out", "grid.png"),
        ("fastdiff", "export", *out, "--out", "exported"),
        ("train_cifar.py", *TRAIN, "--kernels", "triton"),
        before="sys.modules['triton'] = None",
        after="import torch, kernels\n"
        "for spec in kernels.REGISTRY.values():\n"
        "    spec.op(**spec.cases[0].make(torch.float32, torch.Generator()))\n"
        "try:\n"
        "    kernels.launch.traceable(kernels.ema.ema_kernel)\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n",
        cwd=tmp_path,
        path=(repo,),
    )
    assert [line for line in done.stdout.splitlines() if "status" in line] == ["status 0"] * 3 + ["status 1"]
    assert done.stderr == "error: --kernels triton needs Triton, which is not installed here: use --kernels torch.\n"
    assert "this kernel needs Triton" in done.stdout
    assert [path.name for path in (tmp_path / "working").iterdir()] == ["1"]


def test_a_broken_triton_says_so_itself(repo, tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("import of_triton\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    with pytest.raises(ModuleNotFoundError, match="of_triton"):
        runpy.run_path(str(repo / "kernels" / "language.py"))


def test_an_installed_fastdiff_runs_in_any_folder_beside_other_kernels(wheel, others, tmp_path):
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(wheel.parent)]  # an environment in a repository
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "another project's"], check=True)
    done = run_commands(
        ("fastdiff-train", *TRAIN),
        ("fastdiff", "sample", "--checkpoint", "working/1", "--n", 2, "--steps", 2, "--out", "grid.png"),
        after="import kernels, torch; from fastdiff.runtime import device as machine; from fastdiff.nets import fuse\n"
        "print('commit', machine.environment(torch.device('cpu'))['commit'])\n"
        "print(kernels.get_kernel(), fuse.kernels.REGISTRY['ema_update'].op.__module__)\n",
        cwd=tmp_path,
        path=(wheel, others),
    )
    assert done.stdout.count("status 0") == 2, done.stderr
    assert "commit unknown\ntheirs fastdiff._kernels.ema\n" in done.stdout
    assert (tmp_path / "grid.png").exists()


def test_an_installed_fastdiff_has_its_commands_and_no_kernels_at_the_top(wheel):
    assert {path.name.partition("-")[0] for path in wheel.iterdir()} == {"fastdiff", "train_cifar.py"}
    (entries,) = wheel.glob("*.dist-info/entry_points.txt")
    assert entries.read_text().split() == [
        *("[console_scripts]", "fastdiff", "=", "fastdiff.__main__:run"),
        *("fastdiff-train", "=", "train_cifar:run"),
    ]
    for module, function in (("fastdiff/__main__.py", "run"), ("train_cifar.py", "run")):
        names = [node.name for node in ast.parse((wheel / module).read_text()).body if hasattr(node, "name")]
        assert function in names


def test_other_kernels_before_the_repositorys_are_told_of(repo, others, monkeypatch):
    """As where the repository is installed with -e, beside that package."""
    monkeypatch.syspath_prepend(others)
    monkeypatch.delitem(sys.modules, "kernels")
    with pytest.raises(UserError, match=f"`import kernels` finds {others / 'kernels'}"):
        runpy.run_path(str(repo / "fastdiff" / "_kernels.py"))


def test_windows_is_refused_in_one_line(repo, tmp_path):
    done = run_python("import sys; sys.platform = 'win32'; import fastdiff", tmp_path, repo)
    assert done.returncode == 1
    assert done.stderr == "error: fastdiff runs on Linux and macOS; on Windows run it under WSL.\n"


def test_memory_is_in_bytes_on_a_mac_too(monkeypatch):
    linux = machine.memory_peak(torch.device("cpu"))[1]
    monkeypatch.setattr("sys.platform", "darwin")
    assert machine.memory_peak(torch.device("cpu"))[1] == pytest.approx(linux / 1024, rel=0.1)  # the same number

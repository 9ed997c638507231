"""Markers and settings that all tests share."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

pytest_plugins = ["tests.kinds"]
REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # `kernels` must be this repository's, also under importlib mode

# One thread, in new processes too: bit-exact comparisons need one number everywhere, and tiny networks need no more.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


# No limit for one example: it measures how busy the machine is. The tests have limits of their own.
hypothesis.settings.register_profile("fastdiff", deadline=None)
hypothesis.settings.load_profile("fastdiff")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_slow = pytest.mark.skip(reason="slow; run with --slow")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(no_slow)


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    """Commands that run in this process check sys.argv, which is pytest's: `-m ""` is no mistake of theirs."""
    monkeypatch.setattr(sys, "argv", sys.argv[:1])


@pytest.fixture
def modes():
    """modes(folder): the permissions of its files and folders, under the umask of people who share a group."""
    before = os.umask(0o007)
    yield lambda folder: {oct(path.stat().st_mode & 0o777) for path in folder.rglob("*")}
    os.umask(before)


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs in this process draw nothing, which takes them most of their time."""
    for place in (
        "reporting.plots.plot_run",
        "training.train.draw_forward_noising",
        "evaluation.evaluator.draw_trajectory",
    ):
        monkeypatch.setattr(f"fastdiff.{place}", lambda *arguments, **options: None)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root, from which commands are run."""
    return REPO


@pytest.fixture(scope="session")
def cifar_jpeg() -> Path:
    """The archive of real CIFAR-10 images (JPEG) beside the repository, if it is there."""
    path = REPO.parent / "shared" / "data" / "cifar10-jpeg.tar.xz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture
def tiny_config(tmp_path):
    """`small_config` in the test's own folder."""
    from tests.configs import small_config  # not above: kernels are tested where fastdiff is not

    return partial(small_config, tmp_path)


@pytest.fixture
def labelled(tmp_path):
    """An .npz of the images that `tiny_config` trains on, of classes of these names in turn; its path."""

    def make(*class_names, name="labelled.npz"):
        from tests.configs import small_config

        with np.load(small_config(tmp_path).images.data) as saved:
            images = saved["images"]
        labels = np.arange(len(images)) % len(class_names)
        np.savez(tmp_path / name, images=images, labels=labels, class_names=np.array(class_names))
        return str(tmp_path / name)

    return make


@pytest.fixture
def train_in_new_process(repo):
    """Run `train_cifar.py` on a config in a process of its own; returns the completed process."""

    from tests.configs import flags_of

    def run(config, *extra, check=True):
        command = [sys.executable, "train_cifar.py", *flags_of(config), *extra]
        done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=240)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run

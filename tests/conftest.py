"""Markers and settings that all tests share."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from fastdiff.config import Config, UNetConfig

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
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(no_slow)


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    """Commands that run in this process check sys.argv, which is pytest's: `-m ""` is no mistake of theirs."""
    monkeypatch.setattr(sys, "argv", sys.argv[:1])


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


TINY = UNetConfig(image_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4, dropout=0.1)


@pytest.fixture
def tiny_config(tmp_path):
    """A run of 30 steps over 50 smooth images in batches of 8, so that an epoch ends within the 7th step."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (50, 2, 2, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=coarse.repeat(4, 1).repeat(4, 2))

    def make(root: Path | str = "working", **changes) -> Config:
        config = Config.of(
            data=str(tmp_path / "images.npz"), data_root=str(tmp_path / "data"), net=TINY, timesteps=100, batch_size=8,
            lr=1e-3, warmup_steps=5, ema_decay=0.9, steps=30, device="cpu", log_every=10, save_every=10,
            eval_every=1000, keep_last=10,
            run_root=str(tmp_path / root), features="none", eval_batch_size=4, eval_steps=2,
            grid_samples=4,
        )  # fmt: skip
        return config.replace(**changes)

    return make


def flags_of(config):
    """The flags of `train_cifar.py` that make a config."""
    flags = []
    for name, value in config.flat().items():
        if name == "preset" or value is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return flags


@pytest.fixture
def train_in_new_process(repo):
    """Run `train_cifar.py` on a config in a process of its own; returns the completed process."""

    def run(config, *extra, check=True):
        command = [sys.executable, "train_cifar.py", *flags_of(config), *extra]
        done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=240)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run

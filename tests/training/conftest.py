import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from fastdiff.config import Config, UNetConfig

TINY = UNetConfig(image_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4, dropout=0.1)


@pytest.fixture
def tiny_config(tmp_path):
    """A run of 30 steps over 50 smooth images in batches of 8, so that an epoch ends within the 7th step."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (50, 2, 2, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=coarse.repeat(4, 1).repeat(4, 2))

    def make(**changes):
        config = Config(
            data=str(tmp_path / "images.npz"), data_root=str(tmp_path / "data"), net=TINY, timesteps=100, batch_size=8,
            lr=1e-3, warmup_steps=5, ema_decay=0.9, steps=30, device="cpu", log_every=10, save_every=10,
            eval_every=1000, keep_last=10,
            run_root=str(tmp_path / "working"), features="none", eval_batch_size=4, eval_steps=2,
            grid_samples=4,
        )  # fmt: skip
        return dataclasses.replace(config, **changes)

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

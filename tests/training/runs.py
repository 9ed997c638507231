"""What tests of whole runs share: rows, equality, and a signal at a step."""

import json
import os
import signal

import torch

from fastdiff.config import Config
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.runs import checkpoint
from fastdiff.training.step import TrainStep

SHAPE = AutoencoderConfig(factor=2, base_channels=8, blocks=1)
AUTOENCODER = {"root": "auto", "autoencoder": SHAPE, "eval_steps": 50, "steps": 10, "eval_samples": 50}
CPU = torch.device("cpu")


def recorded(run, **flags):
    """The config that --resume begins with."""
    return Config.from_dict(json.loads((run / "config.json").read_text())).replace(**flags)


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def assert_same_run(one, other):
    """Weights, averages, optimizer state and metrics are equal, bit for bit."""
    a, b = (checkpoint.load_latest(run / "checkpoints") for run in (one, other))
    assert a.step == b.step
    for part in ("model", "ema"):
        assert a.state[part].keys() == b.state[part].keys()
        assert all(torch.equal(a.state[part][name], b.state[part][name]) for name in a.state[part])
    flat_a, flat_b = ([*s.state["optimizer"]["state"].items()] for s in (a, b))
    assert len(flat_a) == len(flat_b) > 0
    for (index, mine), (other_index, theirs) in zip(flat_a, flat_b, strict=True):
        assert index == other_index
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert a.state["loss_history"] == b.state["loss_history"]
    for part in ("metrics", "noise_levels", "noise_history"):
        assert a.state[part] == b.state[part]
    assert (one / "loss-by-noise.jsonl").read_bytes() == (other / "loss-by-noise.jsonl").read_bytes()
    assert rows_of(one) == rows_of(other)


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal while it takes its step-th step."""
    real = TrainStep.__call__

    def call(self, images, at, index=None):
        real(self, images, at, index)
        if at + 1 == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TrainStep, "__call__", call)

"""A run, made in a second, that commands use."""

import numpy as np
import pytest
import torch

from fastdiff.config import Config
from fastdiff.nets.text import word_ids
from fastdiff.nets.unet import UNet
from fastdiff.runs import checkpoint
from fastdiff.runs.run import create_run
from tests.evaluation.commands import CLASSES, NET


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints at steps 1 and 2, whose averaged weights differ from its weights."""
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    config = Config.of(
        data=str(tmp_path / "images.npz"), data_root=str(tmp_path / "data"), net=NET, timesteps=100, eval_steps=4
    )
    with create_run(tmp_path / "working", config=config.to_dict()) as made:
        for step in (1, 2):
            torch.manual_seed(step)
            model, ema = UNet(NET), UNet(NET)
            for p in (*model.parameters(), *ema.parameters()):
                torch.nn.init.normal_(p, std=0.05)
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": {}, "config": config.to_dict()}
            checkpoint.save(made.checkpoints, step, state)
        return made.path


@pytest.fixture(params=["bytes", "words"])
def captioned(tmp_path, request):
    """A run of a network that reads texts, made without training."""
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "images.npz", images=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8),
        captions=np.array([["a cat", "one cat"], ["a dog", ""]] * 20),
    )  # fmt: skip
    config = Config.of(
        data=str(tmp_path / "images.npz"), data_root=str(tmp_path / "data"), net=NET, timesteps=100, eval_steps=4,
        text=request.param,
    ).replace(text_encoder=request.param, text_width=8, text_blocks=1)  # fmt: skip
    with create_run(tmp_path / "working", config=config.to_dict()) as made:
        torch.manual_seed(0)
        model = UNet(config.net)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        if request.param == "words":  # these were never trained
            model.text.byte.weight.data[word_ids(["scarlet,"])[0, 1:3]] = 0.0
        state = {"model": model.state_dict(), "ema": model.state_dict(), "optimizer": {}, "config": config.to_dict()}
        checkpoint.save(made.checkpoints, 1, state)
        return made.path


@pytest.fixture
def conditional(tmp_path):
    """A run of a conditional network, made without training, with an earlier checkpoint."""
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "images.npz", images=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), labels=np.arange(40) % 3,
        class_names=np.array(CLASSES),
    )  # fmt: skip
    config = Config.of(
        data=str(tmp_path / "images.npz"), data_root=str(tmp_path / "data"), net=NET, timesteps=100, eval_steps=4,
        conditional=True, class_names=CLASSES,
    ).replace(num_classes=3)  # fmt: skip
    with create_run(tmp_path / "working", config=config.to_dict()) as made:
        for step in (1, 2):
            torch.manual_seed(step)
            model = UNet(config.net)
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.05)
            state = {"model": model.state_dict(), "ema": model.state_dict(), "optimizer": {}}
            checkpoint.save(made.checkpoints, step, {**state, "config": config.to_dict()})
        return made.path

"""The reader of digits that results are measured with."""

import re

import numpy as np
import pytest
import torch

from bench import read_digits
from fastdiff.config import Config
from fastdiff.errors import UsageError
from fastdiff.nets.unet import UNet
from fastdiff.runs import checkpoint
from fastdiff.runs.run import create_run
from tests.evaluation.commands import NET

pytest.importorskip("sklearn")


def untrained(folder, names):
    """A conditional run that was never trained."""
    config = Config.of(data="digits", net=NET, timesteps=100, conditional=True, class_names=names)
    config = config.replace(num_classes=len(names))
    with create_run(folder, config=config.to_dict()) as made:
        weights = UNet(config.net).state_dict()
        saved = {"model": weights, "ema": weights, "optimizer": {}, "config": config.to_dict()}
        checkpoint.save(made.checkpoints, 1, saved)
        return made.path


def test_digits_are_read_by_their_own_reader():
    from sklearn.datasets import load_digits

    from fastdiff.evaluation.attributes import read_digits as read

    digits = load_digits()
    grey = np.kron(digits.images[:200] / 16, np.ones((2, 2), np.float32))
    assert (read(grey) == digits.target[:200]).mean() > 0.99


def test_noise_is_read_right_by_chance(tmp_path, capsys):
    torch.manual_seed(0)
    run = untrained(tmp_path, tuple("0123456789"))
    assert read_digits.main(run, n=20, steps=2) == 0
    share = float(re.match(r"(.*)% of 20 samples at w = 3", capsys.readouterr().out)[1])
    assert share <= 40


def test_a_run_on_other_classes_is_refused(tmp_path):
    with pytest.raises(UsageError, match="was not trained on the ten digits"):
        read_digits.main(untrained(tmp_path, ("cat", "dog")))

"""The reader of samples that results are measured with."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import read_samples
from fastdiff.config import Config
from fastdiff.errors import UsageError
from fastdiff.nets.unet import UNet
from fastdiff.runs import checkpoint
from fastdiff.runs.run import create_run
from tests.evaluation.commands import NET

pytest.importorskip("sklearn")


def save(folder, config, **more):
    """A run of the config that was never trained."""
    with create_run(folder, config=config.to_dict()) as made:
        weights = UNet(config.net).state_dict()
        saved = {"model": weights, "ema": weights, "optimizer": {}, "config": config.to_dict(), **more}
        checkpoint.save(made.checkpoints, 1, saved)
        return made.path


def untrained(folder, names):
    config = Config.of(data="digits", net=NET, timesteps=100, conditional=True, class_names=names)
    return save(folder, config.replace(num_classes=len(names)))


def test_digits_are_read_by_their_own_reader():
    from sklearn.datasets import load_digits

    from fastdiff.evaluation.attributes import read_digits as read

    digits = load_digits()
    grey = np.kron(digits.images[:200] / 16, np.ones((2, 2), np.float32))
    assert (read(grey) == digits.target[:200]).mean() > 0.99


def test_noise_is_read_right_by_chance(tmp_path, capsys):
    torch.manual_seed(0)
    run = untrained(tmp_path, tuple("0123456789"))
    assert read_samples.main(run, n=20, steps=2) == 0
    share = float(re.search(r"w = 3 \| (.*)%", capsys.readouterr().out)[1])
    assert share <= 40


def test_captions_are_read_beside_real_pictures(tmp_path, capsys):
    torch.manual_seed(0)
    net = replace(NET, image_size=16, attention_resolutions=(8,), text_encoder="bytes", text_width=8, text_blocks=1)
    config = Config.of(data="digits-captioned", net=net, timesteps=100, text="bytes")
    assert read_samples.main(save(tmp_path, config), n=20, steps=2, guidance=(0, 3)) == 0
    rows = re.findall(r"\| (.*) \| (.*)% \| (.*)% \| (.*)% \| (.*)% \|", capsys.readouterr().out)
    assert [row[0] for row in rows] == [
        "seen, real pictures", "seen, w = 0", "seen, w = 3",
        "never seen, real pictures", "never seen, w = 0", "never seen, w = 3",
    ]  # fmt: skip
    shares = {name: min(map(float, values)) for name, *values in rows}
    assert shares["seen, real pictures"] >= 95
    assert shares["seen, w = 3"] <= 50


def test_a_run_on_captioned_digits_of_another_version_is_refused(tmp_path):
    net = replace(NET, image_size=16, attention_resolutions=(8,), text_encoder="words", text_width=8, text_blocks=0)
    config = Config.of(data="digits-captioned", net=net, timesteps=100, text="words")
    with pytest.raises(UsageError, match="was trained on digits-captioned of another version"):
        read_samples.main(save(tmp_path, config, data_sha256="0" * 64), n=2, steps=2)


def test_a_run_on_other_classes_is_refused(tmp_path):
    with pytest.raises(UsageError, match="was not trained on digits with classes"):
        read_samples.main(untrained(tmp_path, ("cat", "dog")))

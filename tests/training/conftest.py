"""Runs of autoencoders, and of networks in their latents."""

import shutil

import pytest

from fastdiff.training.train import train
from tests.configs import small_config
from tests.training.runs import AUTOENCODER


@pytest.fixture
def autoencoder(tiny_config, tmp_path):
    """The config of a run that trains an autoencoder."""
    return tiny_config(**AUTOENCODER)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with such a run, which takes a second to train."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiff.reporting.plots.plot_run", lambda *arguments, **options: None)
        assert train(small_config(folder, **AUTOENCODER)) == 0
    return folder / "auto"


@pytest.fixture
def trained(made, tmp_path):
    """Such a run."""
    shutil.copytree(made, tmp_path / "auto")
    return tmp_path / "auto" / "1"


@pytest.fixture
def latent(tiny_config, trained):
    """The config of a run in its latents."""
    return tiny_config(latents=str(trained), image_size=4, steps=20)

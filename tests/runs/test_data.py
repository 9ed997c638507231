import json

import numpy as np
import pytest

from fastdiff.errors import UserError
from fastdiff.presets import PRESETS
from fastdiff.runs import checkpoint
from fastdiff.runs.data import load_run_data
from fastdiff.training.train import train


@pytest.fixture
def run(tiny_config, tmp_path, monkeypatch):
    """The config of a run on the relative path `images.npz`, the images' folder, and the state of its checkpoint."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(data="images.npz", steps=2)
    _, data = load_run_data(config, {})
    return config, tmp_path, {"config": config.to_dict(), **data}


def other_images(path):
    np.savez(path, images=np.random.default_rng(1).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8))


def test_a_run_finds_its_images_from_another_folder_and_on_another_disk(run, monkeypatch):
    config, folder, saved = run
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert load_run_data(config, saved)[0].sha256 == saved["data_sha256"]
    other_images("images.npz")  # of the same name, seen from here
    assert load_run_data(config, saved)[0].sha256 == saved["data_sha256"]
    (folder / "images.npz").rename("images.npz")  # as if all had been copied to another place
    assert load_run_data(config, saved)[1]["data_path"] == str(folder / "elsewhere" / "images.npz")


def test_moved_images_are_the_same_ones_under_their_old_name(run):
    config, folder, saved = run
    (folder / "images.npz").rename(folder / "e.npz")
    with pytest.raises(UserError, match=r"--data images.npz is not there, seen from .*; .* add --data and"):
        load_run_data(config, saved)
    images, data = load_run_data(config.replace(data="e.npz"), saved)
    assert images.name == "images-train"  # so that distances to them go on to compare
    assert data["data_path"] == str(folder / "e.npz")


def test_other_images_are_refused_by_content(run):
    config, _, saved = run
    other_images("e.npz")
    with pytest.raises(UserError) as caught:
        load_run_data(config.replace(data="e.npz"), saved)
    message = str(caught.value)
    assert "holds other images (60, SHA-256 " in message
    assert f"than the run was trained on (50, SHA-256 {saved['data_sha256'][:12]}...)" in message
    del saved["data_images"], saved["data_path"], saved["data_name"]  # a checkpoint of an earlier version
    with pytest.raises(UserError, match=r"trained on \(SHA-256"):
        load_run_data(config.replace(data="e.npz"), saved)
    assert load_run_data(config, saved)[0].sha256 == saved["data_sha256"]


def test_a_run_goes_on_with_moved_images(run):
    config, folder, _ = run
    train(config)
    (folder / "images.npz").rename(folder / "e.npz")
    path = folder / "working" / "1"
    assert train(config.replace(data="e.npz", steps=4), resume=path) == 0
    assert json.loads((path / "config.json").read_text())["images"]["data"] == "e.npz"
    state = checkpoint.load_latest(path / "checkpoints").state
    assert state["data_path"] == str(folder / "e.npz")
    assert load_run_data(config.replace(data="e.npz"), state)[0].name == "images-train"


def test_another_name_must_not_change_whether_images_are_flipped(tiny_config):
    digits = PRESETS["quick"]
    folder = digits.replace(data="digits-as-files")
    assert folder.changes(digits) == {"flip": ("off", "on")}
    assert folder.replace(flip="off").changes(digits) == {}

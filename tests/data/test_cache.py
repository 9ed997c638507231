"""The cache of decoded sets: whole or not there."""

import os

import numpy as np
import pytest

from fastdiff.data.cache import cached, content_sha256

IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
LABELS = np.array([3, 1])


@pytest.mark.parametrize("labels", [LABELS, None])
def test_what_is_read_is_what_was_built(tmp_path, labels):
    built = []

    def build():
        built.append(1)
        return IMAGES, labels

    path = tmp_path / "new" / "set.npz"
    for _ in range(3):
        images, read = cached(path, build)
        np.testing.assert_array_equal(images, IMAGES)
        assert (read is None) == (labels is None)
        assert read is None or (read.dtype == np.int64 and (read == labels).all())
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
    elif how == "other labels":
        np.savez(path, images=IMAGES, labels=LABELS + 1, sha256=np.array(content_sha256(IMAGES, LABELS)))
        return
    elif how == "pickle":
        np.savez(path, images=np.array([object()]), sha256=np.array("x"))
        return
    elif how == "missing":
        np.savez(path, images=IMAGES)
        return
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["empty", "cut", "flipped bit", "other labels", "pickle", "missing"])
def test_a_damaged_cache_is_noticed_and_built_again(tmp_path, how):
    path = tmp_path / "set.npz"
    cached(path, lambda: (IMAGES, LABELS))
    damage(path, how)
    with pytest.warns(UserWarning, match=r"set.npz is damaged"):
        images, labels = cached(path, lambda: (IMAGES, LABELS))
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    cached(path, lambda: pytest.fail("it was built a moment ago"))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_build_that_fails(tmp_path, error):
    def build():
        raise error

    with pytest.raises(error):
        cached(tmp_path / "set.npz", build)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["savez", "fsync", "replace"])
def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch, stage, user_error):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np if stage == "savez" else os, stage, full)
    user_error(lambda: cached(tmp_path / "set.npz", lambda: (IMAGES, LABELS)), "set.npz", "No space left", "data root")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made(tmp_path, user_error):
    (tmp_path / "file").touch()
    user_error(lambda: cached(tmp_path / "file" / "set.npz", lambda: (IMAGES, LABELS)), "set.npz", "cannot be written")


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

"""`.npz` files: what is read, and what is refused because it can hardly be meant."""

import numpy as np
import pytest

from fastdiff.data import npz
from fastdiff.data.datasets import load_dataset

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


def save(tmp_path, **arrays):
    np.savez(tmp_path / "set.npz", **arrays)
    return tmp_path / "set.npz"


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
def test_images_and_labels(tmp_path, root, dtype):
    data = load_dataset(save(tmp_path, images=IMAGES, labels=np.arange(6, dtype=dtype)), root=root, image_size=8)
    np.testing.assert_array_equal(data.images, IMAGES)
    assert data.labels.tolist() == list(range(6))
    assert data.labels.dtype == np.int64
    assert data.name == "set-train"
    assert not root.exists()


def test_grey_and_of_another_size(tmp_path, root):
    for grey in (IMAGES[..., 0], IMAGES[..., :1]):
        data = load_dataset(save(tmp_path, images=grey), root=root, image_size=8)
        assert data.labels is None
        np.testing.assert_array_equal(data.images, np.repeat(IMAGES[..., :1], 3, axis=3))
    assert load_dataset(save(tmp_path, images=IMAGES), root=root, image_size=5).images.shape == (6, 5, 5, 3)


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"pictures": IMAGES}, "'images'"),
        ({"images": IMAGES.astype(np.float32)}, "float32"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, "(6, 3, 8, 8)"),
        ({"images": IMAGES[0, 0]}, "(8, 3)"),
        ({"images": IMAGES[:, :0]}, "without a pixel"),
        ({"images": IMAGES, "labels": np.arange(5)}, "(5,)"),
        ({"images": IMAGES, "labels": np.eye(6, dtype=int)}, "(6, 6)"),
        ({"images": IMAGES, "labels": np.arange(6.0)}, "float64"),
        ({"images": IMAGES, "labels": np.arange(6) - 1}, "at least 0"),
        ({"images": IMAGES[:1]}, "at least 2"),
        ({"images": IMAGES[:0]}, "at least 2"),
        ({"images": np.array([object()])}, "cannot be read"),
    ],
)
def test_of_other_content(tmp_path, root, arrays, named, user_error):
    path = save(tmp_path, **arrays)
    user_error(lambda: load_dataset(path, root=root, image_size=8), "set", named)
    assert not root.exists()


def test_damaged_or_a_bomb(tmp_path, root, monkeypatch, user_error):
    path = save(tmp_path, images=IMAGES)
    content = path.read_bytes()
    path.write_bytes(content[:300])
    user_error(lambda: load_dataset(path, root=root), path, "cannot be read")
    damaged = bytearray(content)
    damaged[content.index(IMAGES.tobytes()) + 9] ^= 1
    path.write_bytes(damaged)
    user_error(lambda: load_dataset(path, root=root, image_size=8), path, "cannot be read")
    bomb = np.zeros((100, 64, 64, 3), np.uint8)
    bomb[0, 0, 0] = 99
    np.savez_compressed(path, images=bomb)
    load_dataset(path, root=root, image_size=64)
    monkeypatch.setattr(npz, "MAX_UNPACKED_BYTES", 1000)
    user_error(lambda: load_dataset(path, root=root, image_size=64), path, "100 times")


@pytest.mark.parametrize(
    ("images", "remedy"),
    [
        (IMAGES[0], "save images[None] for the one, images[..., None] for the others"),
        (np.concatenate([IMAGES[0], IMAGES[0][..., :1]], axis=2), "one image of 4 channels"),
        (IMAGES.transpose(0, 3, 1, 2), "save images.transpose(0, 2, 3, 1)"),
        (np.concatenate([IMAGES, IMAGES[..., :1]], axis=3), "save images[..., :3]"),
        (IMAGES / 255, "save (images * 255).round().astype(np.uint8)"),
        (IMAGES.astype(np.float32) / 127.5 - 1, "save ((images + 1) * 127.5).round().astype(np.uint8)"),
        (IMAGES.astype(np.float64), "save images.round().clip(0, 255).astype(np.uint8)"),
        (IMAGES > 99, "save images.astype(np.uint8) * 255"),
        (IMAGES.astype(np.uint16) * 257, "save (images >> 8).astype(np.uint8)"),
        (IMAGES.astype(np.uint16) * 16, "save (images >> 4).astype(np.uint8)"),
        (np.full_like(IMAGES, 7), "every pixel of the 6 images is 7"),
    ],
)
def test_what_can_hardly_be_meant_is_refused_with_a_conversion(tmp_path, root, images, remedy, user_error):
    user_error(lambda: load_dataset(save(tmp_path, images=images), root=root, image_size=8), "set", remedy)


@pytest.mark.parametrize(
    ("images", "warning"),
    [
        (IMAGES % 2, "all pixels are in 0 to 1, of 0 to 255: multiply them by 255"),
        (IMAGES % 16, "all pixels are in 0 to 15, of 0 to 255: multiply them by 17"),
        (IMAGES % 16 + 200, "all pixels are in 200 to 215, of 0 to 255: spread them over 0 to 255"),
        (IMAGES % 17, None),
    ],
)
def test_a_low_range_is_warned_of(tmp_path, root, images, warning, caplog):
    path = save(tmp_path, images=images)
    load_dataset(path, root=root, image_size=8)
    assert [record.getMessage() for record in caplog.records] == ([f"{path}: {warning}"] if warning else [])


@pytest.mark.parametrize(
    ("labels", "class_names", "named"),
    [
        (np.array([2**64 - 1, 0, 1, 2, 3, 4], np.uint64), None, "0 to 18446744073709551615"),
        (np.array([2**32 - 1, 0, 1, 2, 3, 4], np.uint32), None, "below 1,048,576"),
        (np.arange(6, dtype=np.int8) - 1, None, "-1 to 4"),
        (np.arange(6), list("abcde"), "0 to 5, but must be at least 0 and below 5, as there are 5 'class_names'"),
        (np.arange(6), [[1, 2]], "'class_names' is int64 (1, 2); expected strings"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, root, labels, class_names, named, user_error):
    arrays = {"images": IMAGES, "labels": labels} | ({} if class_names is None else {"class_names": class_names})
    user_error(lambda: load_dataset(save(tmp_path, **arrays), root=root, image_size=8), "set.npz", named)


def test_class_names_and_what_is_left_out(tmp_path, root):
    path = save(tmp_path, images=IMAGES, labels=[2, 0, 2, 2, 0, 2], class_names=["cat", "eel", "dog"], test=IMAGES)
    data = load_dataset(path, root=root, image_size=8)
    assert data.class_names == ("cat", "eel", "dog")
    assert "2 classes: cat 2, dog 4; " in data.describe()
    assert data.describe().endswith("; left out: other arrays (1): 'test'")
    assert load_dataset(save(tmp_path, images=IMAGES), root=root, image_size=8).class_names is None

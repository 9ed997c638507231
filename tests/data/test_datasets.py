"""`load_dataset`: every kind of set, what comes out, and one clear line for every mistake."""

import hashlib
import re

import numpy as np
import pytest
from PIL import Image

from fastdiff.data import datasets, decoding
from fastdiff.data.datasets import ImageSet, load_dataset


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


def cache_files(root):
    return sorted(path.name for path in root.glob(".cache/*"))


@pytest.mark.parametrize("size", [8, 16, 32])
def test_digits(root, size):
    data = load_dataset("digits", root=root, image_size=size)
    assert data.images.shape == (1797, size, size, 3)
    assert data.images.dtype == np.uint8
    assert data.labels.dtype == np.int64
    assert np.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (data.images.min(), data.images.max()) == (0, 255)
    assert (data.images[..., 0] == data.images[..., 2]).all()
    assert data.name == "digits-train"
    assert not root.exists()


def test_digits_keep_their_values_at_8_pixels_and_their_means_at_others(root):
    from sklearn.datasets import load_digits

    truth = load_digits().images * 255 / 16
    np.testing.assert_array_equal(load_dataset("digits", root=root, image_size=8).images[..., 0], np.rint(truth))
    enlarged = load_dataset("digits", root=root, image_size=32).images[..., 0].mean(axis=(1, 2))
    assert np.abs(enlarged - truth.mean(axis=(1, 2))).max() < 12  # clipping moves it a little


def test_digits_have_no_test_split(root, user_error):
    user_error(lambda: load_dataset("digits", root=root, split="test"), "digits", "'test'", "'train'")


@pytest.mark.parametrize("suffix", ["", ".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".zip"])
@pytest.mark.parametrize("inside", ["", "wrapped/twice"])
def test_folders_and_archives_give_the_same_set(pets, pack, root, suffix, inside):
    path = pack(pets, suffix, inside) if suffix else pets
    data = load_dataset(path, root=root, image_size=8)
    assert data.labels.tolist() == [0, 0, 0, 1, 1]
    truth = [
        np.asarray(Image.open(pets / name))
        for name in ["cat/x.png", "cat/y.png", "cat/z.png", "dog/a.png", "dog/b.PNG"]
    ]
    np.testing.assert_array_equal(data.images, truth)
    assert data.name == "pets-train"
    assert data.sha256 == ImageSet.from_arrays(np.array(truth), np.array([0, 0, 0, 1, 1]), "other name").sha256
    assert len(data.sha256) == 64
    assert load_dataset(str(path), root=str(root), image_size=8).sha256 == data.sha256


def test_a_flat_folder_has_no_labels(pets, root):
    data = load_dataset(pets / "cat", root=root, image_size=4)
    assert data.labels is None
    assert data.images.shape == (3, 4, 4, 3)
    assert data.name == "cat-train"


@pytest.mark.parametrize("suffix", ["", ".tar.xz", ".zip"])
def test_splits_share_the_numbers_of_their_classes(split_pets, pack, root, suffix):
    path = pack(split_pets, suffix, "split-pets") if suffix else split_pets
    train, test = (load_dataset(path, root=root, split=split, image_size=8) for split in ("train", "test"))
    assert train.labels.tolist() == [0, 2]  # cat, dog, eel
    assert test.labels.tolist() == [0, 1]
    assert (train.name, test.name) == ("split-pets-train", "split-pets-test")
    np.testing.assert_array_equal(test.images[1], np.asarray(Image.open(split_pets / "test/dog/4.png")))
    assert len(cache_files(root)) == 2


def test_a_set_is_decoded_once_for_each_content_split_and_size(pets, root, monkeypatch):
    decoded = []
    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda data, size: decoded.append(size) or decode(data, size))
    first = load_dataset(pets, root=root, image_size=8)
    again = load_dataset(pets, root=root, image_size=8)
    assert decoded == [8] * 5
    assert again.sha256 == first.sha256
    load_dataset(pets, root=root, image_size=4)
    assert decoded == [8] * 5 + [4] * 5
    (pets / "cat" / "x.png").write_bytes((pets / "dog" / "a.png").read_bytes())
    changed = load_dataset(pets, root=root, image_size=8)
    assert changed.sha256 != first.sha256
    assert len(decoded) == 15
    assert len(cache_files(root)) == 3
    assert all(re.fullmatch(r"pets-train-[48]-[0-9a-f]{16}\.npz", name) for name in cache_files(root))


def test_a_damaged_cache_is_built_again(pets, root):
    first = load_dataset(pets, root=root, image_size=8)
    path = next(root.glob(".cache/*"))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.warns(UserWarning, match="damaged"):
        assert load_dataset(pets, root=root, image_size=8).sha256 == first.sha256


def test_the_root_may_be_the_folder_itself(pets):
    first = load_dataset(pets, root=pets, image_size=8)
    assert load_dataset(pets, root=pets, image_size=8).sha256 == first.sha256
    assert len(cache_files(pets)) == 1


def test_cifar10_by_name(root, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(6)
    monkeypatch.setattr(datasets, "load_cifar10", lambda found, split: (images, labels) if found == root else None)
    data = load_dataset("cifar10", root=root, split="test")
    assert data.name == "cifar10-test"
    np.testing.assert_array_equal(data.images, images)
    assert load_dataset("cifar10", root=root, image_size=16).images.shape == (6, 16, 16, 3)


def test_the_real_archive(cifar_jpeg, root):
    data = load_dataset(cifar_jpeg, root=root, split="test")
    assert data.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(data.labels).tolist() == [1000] * 10
    assert data.name == "cifar10-jpeg-test"
    mean = data.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(mean, (0.494, 0.485, 0.450), atol=0.002)  # the well-known mean of the test set
    assert load_dataset(cifar_jpeg, root=root, split="test").sha256 == data.sha256


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "set.npz", **arrays)
    return tmp_path / "set.npz"


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
def test_npz(tmp_path, root, dtype):
    data = load_dataset(npz(tmp_path, images=IMAGES, labels=np.arange(6, dtype=dtype)), root=root, image_size=8)
    np.testing.assert_array_equal(data.images, IMAGES)
    assert data.labels.tolist() == list(range(6))
    assert data.labels.dtype == np.int64
    assert data.name == "set-train"
    assert not root.exists()


def test_npz_grey_and_of_another_size(tmp_path, root):
    for grey in (IMAGES[..., 0], IMAGES[..., :1]):
        data = load_dataset(npz(tmp_path, images=grey), root=root, image_size=8)
        assert data.labels is None
        np.testing.assert_array_equal(data.images, np.repeat(IMAGES[..., :1], 3, axis=3))
    assert load_dataset(npz(tmp_path, images=IMAGES), root=root, image_size=5).images.shape == (6, 5, 5, 3)


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
def test_npz_of_other_content(tmp_path, root, arrays, named, user_error):
    path = npz(tmp_path, **arrays)
    user_error(lambda: load_dataset(path, root=root, image_size=8), "set", named)
    assert not root.exists()


def test_npz_damaged_or_a_bomb(tmp_path, root, monkeypatch, user_error):
    path = npz(tmp_path, images=IMAGES)
    content = path.read_bytes()
    path.write_bytes(content[:300])
    user_error(lambda: load_dataset(path, root=root), path, "cannot be read")
    damaged = bytearray(content)
    damaged[content.index(IMAGES.tobytes()) + 9] ^= 1
    path.write_bytes(damaged)
    user_error(lambda: load_dataset(path, root=root, image_size=8), path, "cannot be read")
    np.savez_compressed(path, images=np.zeros((100, 64, 64, 3), np.uint8))
    load_dataset(path, root=root, image_size=64)
    monkeypatch.setattr(datasets, "MAX_UNPACKED_BYTES", 1000)
    user_error(lambda: load_dataset(path, root=root, image_size=64), path, "100 times")


@pytest.mark.parametrize("how", ["junk", "cut", "empty"])
@pytest.mark.parametrize("suffix", ["", ".tar.gz", ".zip"])
def test_an_unreadable_image_is_named_and_nothing_is_left(pets, pack, root, how, suffix, user_error):
    bad = pets / "cat" / "y.png"
    bad.write_bytes({"junk": b"junk", "cut": bad.read_bytes()[:-60], "empty": b""}[how])
    path = pack(pets, suffix) if suffix else pets
    user_error(lambda: load_dataset(path, root=root, image_size=8), path, "cat/y.png", "replace or delete")
    assert not root.exists()


def test_mistakes_leave_nothing_behind(tmp_path, pets, split_pets, root, user_error):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (pets / "cat" / "x.png").rename(tmp_path / "one" / "x.png")
    (tmp_path / "a.txt").touch()
    load = load_dataset
    user_error(lambda: load(tmp_path / "gone", root=root), tmp_path / "gone", "no such file", "cifar10, digits")
    user_error(lambda: load("cifar-10", root=root), "cifar-10", "no such file", "cifar10, digits")
    user_error(lambda: load(tmp_path / "empty", root=root), tmp_path / "empty", "no images")
    user_error(lambda: load(tmp_path / "one", root=root), "one", "at least 2")
    user_error(lambda: load(tmp_path / "a.txt", root=root), "a.txt", "folder of images")
    user_error(lambda: load(pets, root=root, split="test"), pets, "'test'")
    user_error(lambda: load(npz(tmp_path, images=IMAGES), root=root, split="test"), "set.npz", "'test'")
    user_error(lambda: load("digits", root=root, image_size=0), "image_size", "at least 1")
    user_error(lambda: load("digits", root=root, image_size=10**6), "GiB", "smaller image size")
    user_error(lambda: load("digits", root=root, split="valid"), "split", "'train' or 'test'")
    assert not root.exists()


def test_the_hash_is_of_the_content_alone():
    labels = np.arange(6)
    data = ImageSet.from_arrays(IMAGES, labels, "a")
    truth = hashlib.sha256(b"(6, 8, 8, 3)" + IMAGES.tobytes() + b"(6,)" + labels.tobytes()).hexdigest()
    assert data.sha256 == ImageSet.from_arrays(IMAGES.copy(), labels, "b").sha256 == truth
    assert data.sha256 != ImageSet.from_arrays(IMAGES, None, "a").sha256


def test_images_are_drawn_from_the_whole_set():
    image_set = ImageSet.from_arrays(np.zeros((1000, 2, 2, 3), np.uint8), None, "sorted")
    drawn = image_set.draw(300, seed=3)
    assert len(set(drawn.tolist())) == 300
    assert abs(drawn.mean() - 499.5) < 60  # 4 standard deviations
    assert (drawn == image_set.draw(300, seed=3)).all()
    assert (drawn != image_set.draw(300, seed=4)).any()
    assert sorted(image_set.draw(1000, seed=0)) == list(range(1000))

"""`load_dataset`: every kind of set, what comes out, and one clear line for every mistake."""

import hashlib
import re
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from fastdiff.data import cache, datasets, decoding
from fastdiff.data.datasets import ImageSet, load_dataset
from fastdiff.data.loaders import make_loader


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
    monkeypatch.setattr(decoding, "decode", lambda data, size, remark: decoded.append(size) or decode(data, size))
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
    assert all(re.fullmatch(r"pets-train-[48]-[0-9a-f]{16}-[0-9a-f]{8}\.npz", name) for name in cache_files(root))


@pytest.mark.parametrize("what", ["our sources", "Pillow"])
def test_another_version_of_what_decodes_is_another_cache(pets, root, monkeypatch, what):
    load_dataset(pets, root=root, image_size=8)
    before = cache_files(root)
    if what == "Pillow":
        monkeypatch.setattr("PIL.__version__", "99")
    else:
        monkeypatch.setattr(datasets, "source_hash", lambda *arguments: "0" * 64)
    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda data, size, remark: 255 - decode(data, size))
    changed = load_dataset(pets, root=root, image_size=8)
    assert changed.images[0, 0, 0, 0] == 255 - np.asarray(Image.open(pets / "cat/x.png"))[0, 0, 0]
    assert len(cache_files(root)) == 2  # the old one may be another environment's
    assert before[0] in cache_files(root)


def test_a_cache_of_an_older_version_without_a_version_in_its_name_is_not_read(pets, root):
    load_dataset(pets, root=root, image_size=8)
    (new,) = root.glob(".cache/*")
    old = new.with_name(f"{new.stem.rpartition('-')[0]}.npz")
    new.rename(old)
    load_dataset(pets, root=root, image_size=8)
    assert sorted(cache_files(root)) == sorted([old.name, new.name])


def test_a_cache_folder_that_is_a_file_does_not_stop_anyone(pets, tmp_path, caplog):
    (tmp_path / "root").touch()
    first = load_dataset(pets, root=tmp_path / "root", image_size=8)
    assert first.labels.tolist() == [0, 0, 0, 1, 1]
    assert "cannot be written" in caplog.text
    assert load_dataset(pets, root="~nobody-of-this-name", image_size=8).sha256 == first.sha256


def test_a_path_whose_home_no_one_knows(root, user_error):
    user_error(lambda: load_dataset("~nobody-of-this-name/pets", root=root), "~nobody-of-this-name/pets", "whole path")
    user_error(lambda: load_dataset("cifar10", root="~nobody-of-this-name"), "~nobody-of-this-name", "whole path")


def test_a_damaged_cache_is_built_again(pets, root, caplog):
    first = load_dataset(pets, root=root, image_size=8)
    path = next(root.glob(".cache/*"))
    path.write_bytes(path.read_bytes()[:500])
    assert load_dataset(pets, root=root, image_size=8).sha256 == first.sha256
    assert "damaged" in caplog.text


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


@pytest.mark.lab
def test_the_real_archive(cifar_jpeg, root):
    data = load_dataset(cifar_jpeg, root=root, split="test")
    assert data.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(data.labels).tolist() == [1000] * 10
    assert data.name == "cifar10-jpeg-test"
    mean = data.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(mean, (0.494, 0.485, 0.450), atol=0.002)  # the well-known mean of the test set
    assert load_dataset(cifar_jpeg, root=root, split="test").sha256 == data.sha256


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


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
    np.savez(tmp_path / "set.npz", images=IMAGES)
    load = load_dataset
    user_error(lambda: load(tmp_path / "gone", root=root), tmp_path / "gone", "no such file", "cifar10, digits")
    user_error(lambda: load("cifar-10", root=root), "cifar-10", "no such file", "cifar10, digits")
    user_error(lambda: load(tmp_path / "empty", root=root), tmp_path / "empty", "no images")
    user_error(lambda: load(tmp_path / "one", root=root), "one", "at least 2")
    user_error(lambda: load(tmp_path / "a.txt", root=root), "a.txt", "folder of images")
    user_error(lambda: load(pets, root=root, split="test"), pets, "'test'")
    user_error(lambda: load(tmp_path / "set.npz", root=root, split="test"), "set.npz", "'test'")
    user_error(lambda: load("digits", root=root, image_size=0), "image_size", "at least 1")
    user_error(lambda: load("digits", root=root, image_size=10**6), "GiB", "smaller image size")
    user_error(lambda: load("digits", root=root, split="valid"), "split", "'train' or 'test'")
    assert not root.exists()


def test_the_line_about_a_set(split_pets, root, pack):
    (split_pets / "train" / "cat" / "notes.txt").touch()
    for path in (split_pets, pack(split_pets, ".zip")):
        for _ in range(2):  # built, and from the cache
            data = load_dataset(path, root=root, image_size=8)
            assert data.class_names == ("cat", "dog", "eel")
            assert data.describe() == (
                "split-pets-train: 2 images of 8x8; split train: folder 'train'; 2 classes: cat 1, eel 1; "
                f"pixels {data.images.min()} to {data.images.max()}, mean {data.images.mean():.1f}; "
                "left out: in 'test' (2); *.txt (1): 'train/cat/notes.txt'"
            )
    assert "10 classes: 0 178, 1 182, 2 177" in load_dataset("digits", root=root).describe()
    many = ImageSet.from_arrays(IMAGES.repeat(20, axis=0), np.arange(120), "many", [f"c\n{i}" for i in range(120)])
    assert "120 classes: c\\n0 1, c\\n1 1, " in many.describe()
    assert " and 110 more; " in many.describe()


def test_what_is_left_out_is_told_as_it_is_now_though_the_images_are_cached(pets, root):
    first = load_dataset(pets, root=root, image_size=8)
    run = pets / "working" / "1"
    for name in ("config.json", "metrics.jsonl"):
        (run / "saves").mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    Image.fromarray(IMAGES[0]).save(run / "saves" / "samples.png")
    again = load_dataset(pets, root=root, image_size=8)
    assert again.sha256 == first.sha256
    assert "run directories (1): 'working/1'" in again.describe()
    assert len(cache_files(root)) == 1


def test_remarks_of_decoding_are_warnings_also_from_the_cache(tmp_path, root, caplog):
    (tmp_path / "scans").mkdir()
    for i in range(3):
        Image.fromarray(IMAGES[i, ..., 0].astype(np.uint16) + 3000).save(tmp_path / "scans" / f"{i}.png")
    Image.fromarray(IMAGES[4]).save(tmp_path / "scans" / "4.png")
    for _ in range(2):
        caplog.clear()
        load_dataset(tmp_path / "scans", root=root, image_size=8)
        (record,) = caplog.records
        assert f"{tmp_path / 'scans'}: 3 of 4 images: 16 bits without a pixel of 4,096 or more" in record.getMessage()


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_bad_files_are_named_together_whatever_is_wrong(pets, pack, root, suffix, user_error):
    (pets / "cat" / "x.png").write_bytes(b"junk")
    (pets / "dog" / "a.png").write_bytes(b"")
    if not suffix:
        (pets / "dog" / "link.png").symlink_to(pets / "nowhere")
    path = pack(pets, suffix) if suffix else pets
    message = user_error(
        lambda: load_dataset(path, root=root, image_size=8), path, "'cat/x.png' (it is not", "'dog/a.png' ("
    )
    assert suffix or "dog/link.png' (No such file or directory)" in message
    assert not root.exists()


def test_the_hash_is_of_the_content_alone():
    labels = np.arange(6)
    data = ImageSet.from_arrays(IMAGES, labels, "a")
    truth = hashlib.sha256(b"(6, 8, 8, 3)" + IMAGES.tobytes() + b"(6,)" + labels.tobytes()).hexdigest()
    assert data.sha256 == ImageSet.from_arrays(IMAGES.copy(), labels, "b").sha256 == truth
    assert data.sha256 != ImageSet.from_arrays(IMAGES, None, "a").sha256


def test_images_are_drawn_from_the_whole_set():
    images = np.arange(1000 * 12, dtype=np.uint8).reshape(1000, 2, 2, 3)
    image_set = ImageSet.from_arrays(images, None, "sorted")
    drawn = image_set.draw(300, seed=3)
    assert len(set(drawn.tolist())) == 300
    assert abs(drawn.mean() - 499.5) < 60  # 4 standard deviations
    assert (drawn == image_set.draw(300, seed=3)).all()
    assert (drawn != image_set.draw(300, seed=4)).any()
    assert sorted(image_set.draw(1000, seed=0)) == list(range(1000))


@pytest.mark.lab
def test_a_large_set_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    """Neither while it is decoded nor later, through the loader that reads from the host."""
    monkeypatch.setattr(cache, "MAPPED", 2**20)
    (tmp_path / "set").mkdir()
    for i in range(180):
        Image.fromarray(np.full((256, 256, 3), i, np.uint8)).save(tmp_path / "set" / f"{i:03}.png")
    whole = 180 * 256 * 256 * 3
    for _ in range(2):  # decoded, then read
        tracemalloc.start()
        images = load_dataset(tmp_path / "set", root=tmp_path, image_size=256)
        loader = make_loader("dali", images, batch_size=4, seed=0)
        batch = next(loader)
        loader.close()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < whole / 2  # NumPy writes 16 MiB at a time
        assert images.images.nbytes == whole
        assert (batch.images[:, 0, 0, 0] == batch.index).all()

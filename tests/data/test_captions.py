"""Captions: from files beside images, from arrays and from templates, and one clear line for every mistake."""

import csv
import json

import numpy as np
import pytest

from fastdiff.data import datasets
from fastdiff.data.captions import caption_templates
from fastdiff.data.datasets import load_dataset

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
TEXTS = {"cat/x.png": ["a cat"], "cat/y.png": ["a cat, again", "ein Kätzchen"], "cat/z.png": ['three "cats"'],
         "dog/a.png": ["a dog"], "dog/b.PNG": ["an old dog"]}  # fmt: skip
CAPTIONS = tuple(map(tuple, TEXTS.values()))


@pytest.fixture
def load(tmp_path):
    return lambda path, captions=True: load_dataset(path, root=tmp_path / "root", image_size=8, captions=captions)


def jsonl(rows):
    return "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in rows) + "\n"


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("file_name", "score", "text"), *((name, 0, text) for name, text in rows)])


def write(folder, how):
    rows = [(name, text) for name, texts in TEXTS.items() for text in texts]
    if how == "jsonl":
        (folder / "metadata.jsonl").write_text(jsonl(TEXTS.items()))
    elif how == "csv":
        write_csv(folder / "metadata.csv", rows)
    elif how == "csv in each folder":
        for kind in ("cat", "dog"):
            write_csv(folder / kind / "metadata.csv", [(name[4:], text) for name, text in rows if kind in name])
    else:
        for name, texts in TEXTS.items():
            suffix = ".TXT" if name.endswith(".PNG") else ".txt"
            (folder / name).with_suffix(suffix).write_text("\n".join(texts) + "\n\n")


@pytest.mark.parametrize("suffix", ["", ".tar.gz", ".zip"])
@pytest.mark.parametrize("how", ["jsonl", "csv", "csv in each folder", "sidecars"])
def test_captions_lie_beside_images(pets, pack, load, how, suffix):
    plain = load(pets, captions=False)
    write(pets, how)
    path = pack(pets, suffix, "wrapped") if suffix else pets
    for _ in range(2):  # built, and from the cache
        data = load(path)
        assert data.captions == CAPTIONS
        assert data.sha256 == plain.sha256  # a run without text goes on
        assert data.labels.tolist() == plain.labels.tolist()
    without = load(path, captions=False)
    assert without.captions is None
    assert ("*.txt (6): " if how == "sidecars" else "metadata.") in without.describe()  # left out, also from the cache
    line = data.describe()
    assert "; 6 captions, such as 'a cat', 'a cat, again', 'ein Kätzchen'; " in line
    assert "metadata" not in line
    assert "cat/x.txt" not in line
    assert "README.txt'" in line


def test_the_hash_of_captions(pets, load):
    write(pets, "csv in each folder")
    data = load(pets)
    assert data.captions == CAPTIONS
    (pets / "dog" / "metadata.csv").write_text("file_name,text\na.png,a dog\nb.PNG,a young dog\n")
    changed = load(pets)
    assert changed.captions[4] == ("a young dog",)
    assert changed.captions_sha256 != data.captions_sha256
    assert load(pets, captions=False).captions_sha256 is None


def test_only_the_splits_own_captions_are_read(split_pets, load):
    (split_pets / "train" / "metadata.jsonl").write_text(jsonl([("cat/1.png", "a cat"), ("eel/2.png", "an eel")]))
    (split_pets / "test" / "metadata.jsonl").write_text("junk")
    assert load(split_pets).captions == (("a cat",), ("an eel",))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (None, "", "no captions beside its images; add metadata.jsonl"),
        ("metadata.jsonl", jsonl([("cat/x.png", "a"), ("cow.png", "b")]), "line 2: there is no image 'cow.png'"),
        ("metadata.jsonl", jsonl([("../cat/x.png", "a")]), "line 1: there is no image '../cat/x.png'"),
        ("metadata.jsonl", jsonl([("cat/x.png", "a")]), "no caption for 4 of 5 images: 'cat/y.png', 'cat/z.png'"),
        ("metadata.jsonl", jsonl([("cat/x.png", " \n")]), "line 1: the caption is empty"),
        (
            "metadata.jsonl",
            '\n{"file_name": "cat/x.png", "text": "\\ud800"}',
            "line 2: the caption '\\ud800' holds half",
        ),
        ("metadata.jsonl", "\n[1]", "line 2: it is no object"),
        ("metadata.jsonl", "{", "line 1: it is not JSON"),
        ("metadata.jsonl", '{"file_name": "cat/x.png", "text": 3}', "line 1: expected 'file_name'"),
        ("metadata.jsonl", '{"file_name": "cat/x.png", "text": []}', "line 1: expected 'file_name'"),
        ("metadata.csv", "file_name,caption\ncat/x.png,a\n", "line 2: expected 'file_name' (a string) and 'text'"),
        ("metadata.csv", "file_name,text\ncat/x.png\n", "line 2: expected 'file_name'"),
        ("metadata.csv", 'file_name,text\ncat/x.png,"a\n', "it is not CSV"),
        ("metadata.csv", b"file_name,text\ncat/x.png,\xff\n", "line 2: byte 0xff is not UTF-8"),
        ("cat/x.txt", b"a cat\nein K\xe4tzchen", "'cat/x.txt', line 2: byte 0xe4 is not UTF-8"),
        ("cat/x.txt", "\n", "no caption for 5 of 5 images"),
    ],
)
def test_mistakes_in_caption_files(pets, load, tmp_path, name, content, told, user_error):
    if name:
        (pets / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    user_error(lambda: load(pets), pets, told)
    assert not (tmp_path / "root").exists()
    assert load(pets, captions=False).captions is None


def test_two_kinds_of_captions_and_two_files_for_one_image(pets, load, user_error):
    write(pets, "sidecars")
    write(pets, "jsonl")
    user_error(lambda: load(pets), "'metadata.jsonl' and in 'cat/x.txt'; remove one kind")
    for path in pets.glob("*/*.[tT]*"):
        path.unlink()
    write(pets, "csv")
    user_error(lambda: load(pets), "another metadata file", "'cat/x.png'")


def test_captions_in_an_npz(tmp_path, load, user_error):
    def saved(captions):
        np.savez(tmp_path / "set.npz", images=IMAGES, captions=captions)
        return tmp_path / "set.npz"

    assert load(saved(["a", "b b", "ç"])).captions == (("a",), ("b b",), ("ç",))
    assert load(saved([["a", "b"], ["c", ""], ["d", " e"]])).captions == (("a", "b"), ("c",), ("d", "e"))
    assert load(saved([b"a", b"b", "ç".encode()])).captions[2] == ("ç",)
    line = load(saved(["a", "b", "c"]), captions=False).describe()
    assert "left out: other arrays (1): 'captions'" in line
    user_error(lambda: load(saved(["a", "", "c"])), "set.npz", "'captions' of image 1", "empty")
    user_error(lambda: load(saved(["a", "b"])), "'captions' is <U1 (2,); expected strings (3,) or (3, K)")
    user_error(lambda: load(saved([1, 2, 3])), "'captions' is int64 (3,)")
    user_error(lambda: load(saved([b"a", b"b", b"\xff"])), "image 2, line 1: byte 0xff is not UTF-8")
    np.savez(tmp_path / "set.npz", images=IMAGES)
    user_error(lambda: load(tmp_path / "set.npz"), "no array 'captions'")
    np.savez(tmp_path / "set.npz", images=IMAGES[:0], captions=np.array([], dtype=str))
    user_error(lambda: load(tmp_path / "set.npz"), "the number of images is 0")


def test_templates_make_captions_of_class_names(pets, tmp_path, load):
    path = tmp_path / "templates.txt"
    path.write_text("a {}\n\nthe {class} is a {}\n")
    data = load(pets, captions=path)
    assert data.captions == (("a cat", "the cat is a cat"),) * 3 + (("a dog", "the dog is a dog"),) * 2
    assert caption_templates(path, ["\\1"]) == (("a \\1", "the \\1 is a \\1"),)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a {}\na picture\n", "line 2: no place for the class in 'a picture'"),
        ("a {}\na {colour} {}\n", "line 2: '{colour}' stands for nothing"),
        ("a {", "line 1: '{' stands for nothing"),
        ("\n\n", "has no template"),
        (b"a {}\n\xff{}", "line 2: byte 0xff is not UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_mistakes_in_templates(pets, tmp_path, load, content, told, user_error):
    path = tmp_path / "templates.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    user_error(lambda: load(pets, captions=path), path, told)


def test_sets_without_captions_or_class_names_say_so(pets, tmp_path, load, user_error, monkeypatch):
    monkeypatch.setattr(datasets, "load_cifar10", lambda root, split: (IMAGES, np.array([3, 0, 3])))
    (tmp_path / "templates.txt").write_text("a {}")
    user_error(lambda: load("cifar10"), "cifar10 has no captions", "templates")
    user_error(lambda: load(pets / "cat", captions=tmp_path / "templates.txt"), "cat-train has no class names")
    assert load("cifar10", captions=tmp_path / "templates.txt").captions == (("a cat",), ("a airplane",), ("a cat",))

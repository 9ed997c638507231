"""Which images are of a split, what classes they have, and what is refused because names do not tell."""

from pathlib import Path

import pytest

from fastdiff.data.decoding import FORMATS
from fastdiff.data.files import open_files
from fastdiff.data.layout import IMAGE_SUFFIXES, Listing, choose, sort_out
from fastdiff.runs.run import create_run

SET = Path("set")


def pick(names, split="train"):
    return choose(sort_out(names, {}), split, SET)


@pytest.mark.parametrize(
    ("names", "split", "chosen", "labels"),
    [
        (["a.png", "b.png"], "train", ["a.png", "b.png"], None),
        (["cat/a.png", "dog/b.png"], "train", ["cat/a.png", "dog/b.png"], [0, 1]),
        (["pets/cat/a.png", "pets/dog/b.png"], "train", ["pets/cat/a.png", "pets/dog/b.png"], [0, 1]),
        (["x/y/a.png", "x/y/b.png"], "train", ["x/y/a.png", "x/y/b.png"], None),
        (["cat/old/a.png", "cat/b.png", "dog/c.png"], "train", ["cat/b.png", "cat/old/a.png", "dog/c.png"], [0, 0, 1]),
        (["test/a.png", "train/b.png", "val/c.png"], "train", ["train/b.png"], None),
        (["test/a.png", "train/b.png"], "test", ["test/a.png"], None),
        (["train/a.png", "train/b.png"], "train", ["train/a.png", "train/b.png"], None),
        (
            ["s/test/b/1.png", "s/train/a/2.png", "s/train/c/3.png"],
            "train",
            ["s/train/a/2.png", "s/train/c/3.png"],
            [0, 2],
        ),
        (["s/test/b/1.png", "s/train/a/2.png", "s/train/c/3.png"], "test", ["s/test/b/1.png"], [1]),
        (["train/bus/1.png", "train/train/2.png"], "train", ["train/bus/1.png", "train/train/2.png"], [0, 1]),
        (["bus/1.png", "bullet_train/2.png"], "train", ["bullet_train/2.png", "bus/1.png"], [0, 1]),
        (["one.png"], "train", ["one.png"], None),
    ],
)
def test_choose(names, split, chosen, labels):
    choice = pick(names, split)
    assert (choice.names, choice.labels) == (chosen, labels)


def test_class_names_and_notes():
    choice = pick(["Train/cat/a.png", "Test/dog/b.png", "Test/dog/c.png", "Test/notes.txt", "Train/._a.png"])
    assert choice.class_names == ("cat", "dog")
    assert choice.notes == (
        "split train: folder 'Train'",
        "left out: in 'Test' (2); *.txt (1): 'Test/notes.txt'; hidden (1): 'Train/._a.png'",
    )
    assert pick(["a.png"]).class_names is None
    assert pick(["a.png"]).notes == ("split train: all of it",)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"), ("Train", "Test"), ("TRAIN", "TEST"), ("training", "testing"), ("Training", "Validation"),
        ("train", "val"), ("train", "valid"), ("train", "dev"), ("train", "eval"), ("training_set", "test_set"),
        ("trainset", "testset"), ("train_images", "test_images"), ("images-train", "images-test"),
        ("trainData", "testData"), ("train2017", "val2017"), ("pets-train", "pets-test"),
        ("petsTrain", "petsTest"), ("train", "test1"),
    ],
)  # fmt: skip
def test_names_of_splits(train, test):
    names = [f"{train}/cat/1.png", f"{train}/cat/2.png", f"{test}/cat/3.png"]
    assert pick(names).names == names[:2]
    assert pick([f"wrapped/{name}" for name in names]).names == [f"wrapped/{name}" for name in names[:2]]


REFUSED = {
    "a folder beside splits": (["train/a.png", "test/b.png", "extra/c.png"], ["'extra' (1 image), ", "'test'"]),
    "figures": (["figures/a.png", "train/cat/b.png"], ["'figures' (1 image)", "'train'"]),
    "an image beside splits": (["train/a.png", "test/b.png", "cover.png"], ["1 image beside", "'train'"]),
    "a class called train": (["bus/1.png", "train/2.png"], ["'bus'", "if all are classes, put them into"]),
    "splits of two sets": (["a-train/1.png", "b-test/2.png"], ["'a-train'", "'b-test'"]),
    "two train folders": (["Train/a.png", "train/b.png", "test/c.png"], ["'Train', 'train' all say 'train'"]),
    "images beside masks": (["images/1.png", "masks/1.png"], ["'images' (1 image)", "'masks'"]),
    "splits inside classes": (["cat/train/1.png", "cat/test/2.png", "dog/train/3.png"], ["'cat/test', 'cat/train'"]),
    "a split inside a class": (["train/cat/1.png", "train/cat/test/2.png"], ["'train/cat/test'"]),
    "a split inside a split": (["train/train/1.png", "test/test/2.png"], ["'train/train'", "give the folder above"]),
    "classes by case": (["train/Cat/1.png", "test/cat/2.png"], ["'Cat', 'cat' differ only in case"]),
    "images beside classes": (["cat/a.png", "b.png"], ["'b.png'", "class folders"]),
    "of one split": (["test/cat/a.png", "train/b.png"], ["'train/b.png'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_names_do_not_tell_is_refused(case, user_error):
    names, parts = REFUSED[case]
    user_error(lambda: pick(names), "set", *parts)
    user_error(lambda: pick([f"wrapped/{name}" for name in names]), "set")


def test_a_split_that_is_not_there(user_error):
    user_error(lambda: pick(["cat/a.png", "dog/b.png"], "test"), "set", "'test'", "all is 'train'")
    user_error(lambda: pick(["train/a.png", "train/b.png"], "test"), "set", "'test'", "it has 'train' (2 images)")
    user_error(lambda: pick(["Testing/a.png"]), "set", "'train'", "it has 'Testing'")


def test_no_images(user_error):
    user_error(lambda: choose(Listing([], {}), "train", SET), "set", "no images in it; expected files", ".png")
    message = user_error(lambda: pick([f"{i}.heic" for i in range(1200)] + ["a"]), "*.heic (1,200): '0.heic', ")
    assert "without a suffix (1): 'a'" in message


def test_what_is_passed_over_is_counted_and_named():
    names = [
        "cat/a.png", "cat/b.heic", "cat/c", "cat/._a.png", "Thumbs.db", ".git/x.png", ".git/y.png",
        "__MACOSX/cat/._a.png", "@eaDir/a.png", "README.txt", "readme.TXT",
    ]  # fmt: skip
    listing = sort_out(names, {"pipes or devices": ["p"]})
    assert listing.images == ["cat/a.png"]
    assert listing.left_out == {
        "pipes or devices": ["p"],
        "*.heic": ["cat/b.heic"],
        "without a suffix": ["cat/c"],
        "hidden": ["cat/._a.png", ".git", "__MACOSX", "@eaDir"],
        "*.db": ["Thumbs.db"],
        "*.txt": ["README.txt", "readme.TXT"],
    }


@pytest.mark.parametrize("where", ["working/1/", "1/", ""])
def test_run_directories_are_left_out(where):
    run = [f"{where}config.json", f"{where}saves/samples.png", f"{where}saves/fid.png"]
    for mark in ("metrics.jsonl", "checkpoints/step-1/manifest.json"):
        listing = sort_out(["cat/1.png", "working2/x.png", *run, f"{where}{mark}"], {})
        assert listing.left_out["run directories"] == [where.rstrip("/") or "."]
        assert listing.images == (["cat/1.png", "working2/x.png"] if where else [])
    assert len(sort_out(run, {}).images) == 2  # a config.json alone makes no run


def test_a_run_as_it_is_made_is_left_out(tmp_path):
    with create_run(tmp_path / "working", config={}) as run:
        (run.saves / "samples.png").touch()
    (tmp_path / "a.png").touch()
    listing = open_files(tmp_path).listing
    assert listing == Listing(["a.png"], {"run directories": ["working/1"]})


def test_every_suffix_of_what_is_decoded_counts_as_an_image():
    from PIL import Image

    Image.init()
    registered = {suffix for suffix, format in Image.registered_extensions().items() if format in (*FORMATS, "MPO")}
    assert registered <= set(IMAGE_SUFFIXES)

"""What is trained on is what a plain reading of generated folders and archives says, or it is refused with the reason.

`generate` makes a set as people keep them; `enumerate_plainly` reads it by rules written down here a second time, in
the simplest way. Each image is of one colour, its number, so that the arrays tell which files they came from.
"""

import io
import os
import random
import tarfile
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.data.datasets import load_dataset
from fastdiff.errors import UserError
from tests.reliability.conftest import counts

# Names of split folders, as people write them; a pair of the second kind counts only where nothing else is beside it.
PLAIN = {
    "train": [
        "train",
        "Train",
        "TRAIN",
        "training",
        "Training",
        "train_images",
        "training_set",
        "train2017",
        "trainset",
    ],
    "test": ["test", "Test", "TEST", "testing", "test_images", "test_set", "test-data", "test1"],
    "val": ["val", "Valid", "validation", "dev", "eval"],
}
PREFIXED = {"train": ["pets-train", "petsTrain"], "test": ["pets-test", "petsTest"], "val": ["pets_val"]}
SPLIT_OF = {name: split for table in (PLAIN, PREFIXED) for split, names in table.items() for name in names}
CLASSES = ["cat", "dog", "Zebra", "äöü", "two words", "0", "bus", "a.b"]
HIDDEN = ["._0.png", ".hidden/0.png", "__MACOSX/0.png", "@eaDir/0.png", ".cache/0.png", ".DS_Store"]
OTHERS = ["Thumbs.db", "README.txt", "labels.csv", "photo.heic", "noending", "inner.zip", "scan.png.bak"]
FORMATS = {
    **{".png": "PNG", ".PNG": "PNG", ".bmp": "BMP", ".gif": "GIF", ".tiff": "TIFF", ".ppm": "PPM", ".jpg": "JPEG"},
    **{".jfif": "JPEG", ".jpe": "JPEG", ".JPEG": "JPEG", ".webp": "WEBP", ".avif": "AVIF", ".jp2": "JPEG2000"},
}
JUNK = (b"", b"junk", b"\x89PNG\r\n\x1a\n cut off")
LEVELS = 7  # of each channel, 40 apart: what JPEG changes is less


@cache
def encode(number: int, suffix: str) -> bytes:
    colour = tuple(40 * (number // LEVELS**i % LEVELS) for i in range(3))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, FORMATS[suffix])
    return buffer.getvalue()


def number_of(pixels: np.ndarray) -> int:
    levels = np.rint(pixels.mean(axis=(0, 1)) / 40).astype(int)
    return sum(int(level) * LEVELS**i for i, level in enumerate(levels))


# ---------------------------------------------------------------------------------------------------- the generator


def generate(rng: random.Random, root: Path) -> Path:
    """A folder or an archive below `root`."""
    files: dict[str, bytes] = {}

    def add_images(folder: str, most: int = 4) -> None:
        for _ in range(rng.randint(1, most)):
            suffix = rng.choice(list(FORMATS))
            files[f"{folder}{len(files)}{suffix}"] = encode(len(files) + 1, suffix)

    def add_classes(folder: str) -> None:
        for name in rng.sample(CLASSES, rng.randint(1, 3)):
            add_images(f"{folder}{name}/{rng.choice(['', '', 'deeper/'])}")

    fill = rng.choice([add_images, add_classes, add_classes])
    layout = rng.choice([*["no splits"] * 3, *["splits"] * 5, "strays", "inside", "twice", "case"])
    top = rng.choice(["", "", "pets/", "My Pets/v 2/"])
    if layout in ("no splits", "case"):
        fill(top)
    else:
        table = rng.choice([PLAIN, PLAIN, PREFIXED])
        for split in rng.choice([["train"], ["train", "test"], ["train", "test"], ["test", "val"], list(table)]):
            for name in rng.sample(table[split], 2 if layout == "twice" and len(table[split]) > 1 else 1):
                fill(f"{top}{name}/")
    if layout == "strays":
        add_images(top + rng.choice(["", "extra/", "figures/", "images/", "bus/"]), most=1)
    if layout == "inside":
        add_images(f"{top}{rng.choice(['cat', 'dog', 'train/cat'])}/{rng.choice(['train', 'Test', 'val'])}/", most=2)
    if layout == "case":
        add_images(f"{top}CAT/", most=2)

    folders = sorted({name.rpartition("/")[0] for name in files})
    for _ in range(rng.choice([0, 1, 4])):
        folder = rng.choice(folders)
        extra = rng.choice([*HIDDEN, *OTHERS])
        files[f"{folder}/{extra}".lstrip("/")] = encode(300, ".png")
    if rng.random() < 0.3:
        run = rng.choice(["working/1/", f"{rng.choice(folders)}/working/7/".lstrip("/")])
        mark = rng.choice(["metrics.jsonl", "checkpoints/step-5/manifest.json"])
        files |= {f"{run}config.json": b"{}", f"{run}{mark}": b"", f"{run}saves/samples.png": encode(301, ".png")}
    if rng.random() < 0.15:
        for name in rng.sample(sorted(files), min(len(files), rng.choice([1, 2, 12]))):
            if name.lower().endswith(tuple(FORMATS)):
                files[name] = rng.choice(JUNK)
    kind = rng.choice(["folder", "folder", ".zip", "windows.zip", ".tar", ".tar.gz"])
    return make_folder(rng, root / "set", files) if kind == "folder" else pack(rng, root / f"set{kind}", files)


def make_folder(rng: random.Random, path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    folders = sorted(folder for folder in path.rglob("*") if folder.is_dir())
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    for i in (310, 311):
        (elsewhere / f"{i}.png").write_bytes(encode(i, ".png"))
    place = rng.choice([path, *folders])
    for _ in range(rng.choice([0, 0, 1, 2])):
        target = rng.choice([elsewhere, elsewhere, *folders, path, elsewhere / "310.png", path / "nowhere.png"])
        link = place / f"link-{rng.randrange(99)}{target.suffix}"
        if not link.exists() and not link.is_symlink():
            link.symlink_to(target)
    return path


def pack(rng: random.Random, path: Path, files: dict[str, bytes]) -> Path:
    names = list(files)
    rng.shuffle(names)
    outside = rng.choice([[], ["../up.png", "/root.png", "cat/../../up.png"]])
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in [*names, *outside]:
                stored = name.replace("/", "\\") if "windows" in path.name else name
                archive.writestr(stored, files.get(name, encode(320, ".png")))
            if "windows" in path.name:
                archive.writestr("C:\\Users\\me.png", encode(321, ".png"))
                archive.writestr("cat\\", b"")
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name in [*names, *outside]:
            content = files.get(name, encode(320, ".png"))
            member = tarfile.TarInfo(rng.choice(["", "./"]) + name if name in files else name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if rng.random() < 0.5:
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    return path


# ------------------------------------------------------------------------------------------- the plain enumerator


class Refused(Exception):
    """The set should be refused by a message that holds each of `args`."""


def enumerate_plainly(path: Path, split: str) -> tuple[list[tuple[int, str | None]], int]:
    """(number, class or None) of each image of the split, sorted; and how many files are not among them."""
    files = read_folder(path) if path.is_dir() else read_archive(path)
    images = {name: content for name, content in files.items() if is_image(name, files)}
    paths = {tuple(name.split("/")): content for name, content in images.items()}
    if not paths:
        raise Refused("no images")
    while True:  # look through what wraps everything
        tops = {parts[0] if len(parts) > 1 else "" for parts in paths}
        (only, *more) = tops
        if more or only == "" or (only in SPLIT_OF and not only.startswith("pets")):
            break
        paths = {parts[1:]: content for parts, content in paths.items()}
    said = {top: SPLIT_OF.get(top) for top in tops}
    plain = [top for top in tops if said[top] and not top.startswith("pets")]
    prefixed = [top for top in tops if said[top] and top.startswith("pets")]
    if len(plain) == len(tops) or (len(prefixed) == len(tops) > 1):
        ours = [top for top in tops if said[top] == split]
        if not ours:
            raise Refused("no images for split", *(repr(top) for top in tops))
        if len(ours) > 1:
            raise Refused(f"all say '{split}'", *(repr(top) for top in ours))
        everyone = {parts[1:] for parts in paths}
        paths = {parts[1:]: content for parts, content in paths.items() if parts[0] == ours[0]}
    elif plain or len({said[top] for top in prefixed}) > 1 or ("images" in tops and len(tops) > 1):
        raise Refused("cannot be told", *(repr(top) for top in tops if top))
    elif split != "train":
        raise Refused("no images for split")
    else:
        everyone = set(paths)
    classes = {parts[0] for parts in everyone if len(parts) > 1}
    if classes:
        if any(len(parts) == 1 for parts in paths):
            raise Refused("lies beside class folders")
        if any(part in SPLIT_OF and not part.startswith("pets") for parts in paths for part in parts[1:-1]):
            raise Refused("have names of splits")
        if all(name in SPLIT_OF for name in classes):
            raise Refused("have names of splits")
        if len({name.lower() for name in classes}) < len(classes):
            raise Refused("differ only in case")
    if len(paths) < 2:
        raise Refused("at least 2")
    if bad := [parts for parts, content in paths.items() if content is None or content in JUNK]:
        few = ["/".join(parts) for parts in bad] if len(bad) <= 10 else []
        raise Refused(f"{len(bad)} of {len(paths)} files cannot be read", *few)
    numbers = [(decoded(content), parts[0] if classes else None) for parts, content in paths.items()]
    if len({number for number, _ in numbers}) == 1 == len(set(paths.values())):
        raise Refused("every pixel")
    return sorted(numbers, key=str), len(files) - len(paths)


def decoded(content: bytes) -> int:
    return number_of(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def is_hidden(parts: tuple[str, ...]) -> bool:
    return any(part[0] == "." or part in ("__MACOSX", "@eaDir") for part in parts)


def is_image(name: str, files: dict) -> bool:
    parts = name.split("/")
    for i in range(len(parts)):
        folder = "".join(f"{part}/" for part in parts[:i])
        marks = (f"{folder}metrics.jsonl", f"{folder}checkpoints/")
        if f"{folder}config.json" in files and any(other.startswith(marks) for other in files):
            return False
    return not is_hidden(tuple(parts)) and name.lower().endswith(tuple(map(str.lower, FORMATS)))


def read_folder(path: Path) -> dict[str, bytes | None]:
    """name -> content, None for a link that leads nowhere; a folder in the set or linked twice counts once."""
    path = path.resolve()
    files, seen = {}, set()
    for directory, folders, names in os.walk(path, followlinks=True):
        for link in filter(os.path.islink, (Path(directory, folder) for folder in sorted(folders))):
            real = link.resolve()
            inside = real.is_relative_to(path) and not is_hidden(real.relative_to(path).parts)
            if inside or real in seen:
                folders.remove(link.name)
            seen.add(real)
        folders.sort()
        for name in names:
            file = Path(directory, name)
            files[file.relative_to(path).as_posix()] = file.read_bytes() if file.exists() else None
    return files


def read_archive(path: Path) -> dict[str, bytes | None]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            files = {name.replace("\\", "/"): archive.read(name) for name in archive.namelist()}
    else:
        with tarfile.open(path) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive if member.isreg()}
    safe = {name.removeprefix("./"): content for name, content in files.items() if ".." not in name}
    return {name: content for name, content in safe.items() if name[0] != "/" and ":" not in name and name[-1] != "/"}


# ------------------------------------------------------------------------------------------------- the comparison


@counts(fast=30, slow=300)
def test_what_is_trained_on_is_what_is_there(tmp_path, promise, count):
    outcomes = Counter()
    with promise("Data sets: the images of the split and no others, or refused with the reason", "sets") as p:
        for index in range(count):
            rng = random.Random(index)
            root = tmp_path / str(index)
            root.mkdir()
            path, split = generate(rng, root), rng.choice(["train", "train", "train", "test"])
            with p.case(f"{index}: {path.name}, {split}"):
                outcomes[check(path, root / "data", split)] += 1
    assert outcomes["trained on"] > count / 4
    assert outcomes["refused"] > count / 4


def check(path: Path, root: Path, split: str) -> str:
    try:
        truth, others = enumerate_plainly(path, split)
    except Refused as refused:
        with pytest.raises(UserError) as caught:
            load_dataset(path, root=root, split=split, image_size=8)
        for part in refused.args:
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)
        return "refused"
    for _ in range(2):  # decoded, then from the cache
        images = load_dataset(path, root=root, split=split, image_size=8)
        names = [None] * len(images.images)
        if images.labels is not None:
            names = [images.class_names[label] for label in images.labels]
        found = sorted(zip(map(number_of, images.images), names, strict=True), key=str)
        assert found == truth, f"{found} instead of {truth}"
        assert ("left out: " in images.describe()) >= (others > 0), images.describe()
        assert f"split {split}: " in images.describe()
    return "trained on"

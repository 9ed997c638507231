"""Which images belong to a split and which classes they have, as the names of files and folders say.

Where the names do not tell, nothing is guessed: the error lists what was seen.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastdiff.errors import UserError
from fastdiff.words import counted

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".qoi"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif", ".avifs"),
)
SPLITS = {  # word in a folder's name -> split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val"),
}
FILLERS = {"set", "split", "data", "dataset", "image", "images", "img", "imgs"}  # words that may stand beside it
CONTAINERS = {"data", "image", "images", "img", "imgs", "jpegimages"}  # never a class: what stands beside is no image
SYSTEM_FOLDERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}


@dataclass(frozen=True)
class Listing:
    """What a folder or an archive holds."""

    images: list[str]  # names of the image files, with "/", sorted
    left_out: dict[str, list[str]]  # reason -> names of what is passed over

    def without(self, used: Iterable[str]) -> "Listing":
        """The listing, where files that are used after all are not passed over."""
        gone = set(used)
        kept = {why: [name for name in names if name not in gone] for why, names in self.left_out.items()}
        return Listing(self.images, {why: names for why, names in kept.items() if names})


@dataclass(frozen=True)
class Choice:
    """The images of one split."""

    names: list[str]  # of the files, sorted
    labels: list[int] | None  # the number of each one's class; None where there are no classes
    class_names: tuple[str, ...] | None  # by number, sorted; None where there are no classes
    notes: tuple[str, ...]  # which folder the split is, and what was passed over


def some(items: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """The first few items, and how many more there are."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


def is_hidden(part: str) -> bool:
    """Whether a file or folder of this name is hidden, or an operating system's own."""
    return part.startswith(".") or part.lower() in SYSTEM_FOLDERS


def sort_out(names: Iterable[str], left_out: Mapping[str, list[str]]) -> Listing:
    """Tell the images, by their suffixes, from what is passed over: the hidden, run directories, and other files.

    Args:
        names: of all files, with "/". A name that ends in "/" is a folder's, and counts only where that is hidden.
        left_out: what has been passed over before.
    """
    names = list(names)
    runs = _run_directories(names)
    images: list[str] = []
    found: defaultdict[str, dict[str, None]] = defaultdict(dict)  # the inner ones are ordered sets
    for name in names:
        parts = name.split("/")
        hidden = next((i for i, part in enumerate(parts, 1) if is_hidden(part)), None)
        if hidden is not None:
            found["hidden"]["/".join(parts[:hidden])] = None
        elif runs and (run := next((run for run in _parents(name) if run in runs), None)) is not None:
            found["run directories"][run or "."] = None
        elif name.lower().endswith(IMAGE_SUFFIXES):
            images.append(name)
        elif file := parts[-1]:
            _, dot, suffix = file.rpartition(".")
            found[f"*.{suffix.lower()}" if dot else "without a suffix"][name] = None
    return Listing(sorted(images), {**left_out, **{why: list(them) for why, them in found.items()}})


def _parents(name: str) -> Iterable[str]:
    """The folders that a file lies in, the innermost first and "" last."""
    while name:
        name = name.rpartition("/")[0]
        yield name


def _run_directories(names: list[str]) -> set[str]:
    """Folders that training runs made: with `config.json`, and `metrics.jsonl` or `checkpoints/`."""
    marks: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        folder, _, file = name.rpartition("/")
        if file in ("config.json", "metrics.jsonl"):
            marks[folder].add(file)
        elif "checkpoints/" in name:
            marks[f"/{name}".partition("/checkpoints/")[0][1:]].add("checkpoints")
    return {folder for folder, found in marks.items() if "config.json" in found and len(found) > 1}


def told(left_out: Mapping[str, list[str]]) -> list[str]:
    """What was passed over, as "reason (count): first names", the largest count first."""
    ordered = sorted(left_out.items(), key=lambda item: -len(item[1]))
    return [f"{why} ({len(names):,}): {some(list(map(repr, names)))}" for why, names in ordered]


def choose(listing: Listing, split: str, origin: Path) -> Choice:
    """The files of one split and their labels.

    - Folders that wrap everything are looked through: `pets/cat/1.png, pets/dog/2.png` is read as `cat/1.png, ...`.
    - If the top-level folders are splits, the files under `split`; otherwise everything is "train". A split's name is a
      word of `SPLITS` in any case, alone or with `FILLERS` and numbers (`Train`, `test_images`, `val2017`), or with
      what all of them share (`pets-train` beside `pets-test`).
    - Files directly there have no labels. Subfolders are classes, numbered in the sorted order of the classes of all
      splits; what lies deeper belongs to the class above it.

    Raises:
        UserError: no images, no such split, images beside class folders, or unclear names: only some folders are
            splits, two folders for one split, splits inside classes, classes that differ only in case.
    """
    if not listing.images:
        seen = f" (left out: {some(told(listing.left_out), 6, '; ')})" if listing.left_out else ""
        raise UserError(f"{origin}: no images in it{seen}; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
    paths = [name.split("/") for name in listing.images]
    top = 0
    while len(folders := _folders(paths, top)) == 1 and not any(map(_is_split, folders)) and "" not in folders:
        top += 1
    folder = _split_folder(folders, split, origin)
    level = top if folder is None else top + 1  # of the classes
    classes = sorted(_folders(paths, level).keys() - {""})
    chosen = [i for i, path in enumerate(paths) if folder in (None, path[top])]
    if classes:
        _check_classes([paths[i] for i in chosen], level, classes, origin)
    number = {name: i for i, name in enumerate(classes)}
    passed = [f"in {other!r} ({n:,})" for other, n in folders.items() if folder not in (None, other)]
    passed += told(listing.left_out)
    return Choice(
        names=[listing.images[i] for i in chosen],
        labels=[number[paths[i][level]] for i in chosen] if classes else None,
        class_names=tuple(classes) or None,
        notes=(
            f"split {split}: {'all of it' if folder is None else f'folder {folder!r}'}",
            *([f"left out: {some(passed, 6, '; ')}"] if passed else []),
        ),
    )


def _folders(paths: list[list[str]], level: int) -> Counter[str]:
    """Folder at that level -> number of images in it; "" stands for images that lie directly there."""
    return Counter(path[level] if len(path) > level + 1 else "" for path in paths)


@cache
def _parse(folder: str) -> tuple[str, tuple[str, ...]]:
    """Which split a folder's name says ("" for none), and its other words: "petsTrain_2" -> "train", ("pets",)."""
    splits, rest = set(), []
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder).lower())
    for word in words:
        if split := SPLITS.get(re.sub("(set|data|images)$", "", word)):
            splits.add(split)
        elif word not in FILLERS:
            rest.append(word)
    return "/".join(sorted(splits)), tuple(rest)


def _is_split(folder: str) -> bool:
    """Whether the name says a split and nothing else."""
    split, rest = _parse(folder)
    return bool(split) and not rest


def _split_folder(folders: Counter[str], split: str, origin: Path) -> str | None:
    """The top-level folder that is the split; None if there are no splits, so that everything is "train"."""
    counts = {name: counted(n, "image") for name, n in sorted(folders.items())}
    seen = some([f"{name!r} ({count})" if name else f"{count} beside them" for name, count in counts.items()], 10)
    said, rests = zip(*map(_parse, folders), strict=True)
    if all(said) and len(set(rests)) == 1 and (len(folders) > 1 or rests == ((),)):
        ours = sorted(name for name in folders if _parse(name)[0] == split)
        if not ours:
            raise UserError(f"{origin}: no images for split {split!r} (it has {seen}); choose another split")
        if len(ours) > 1:
            names = some(list(map(repr, ours)))
            raise UserError(f"{origin}: {names} all say {split!r}; merge them, or give one of them alone")
        return ours[0]
    contained = len(folders) > 1 and any(name.lower() in CONTAINERS for name in folders)
    if contained or any(map(_is_split, folders)) or len(set(said) - {""}) > 1:
        raise UserError(
            f"{origin}: which images are {split!r} cannot be told from its folders {seen}; give one of them alone, or "
            "move the others out; if all are classes, put them into a folder train/"
        )
    if split != "train":
        why = "without folders train/ and test/ all is 'train'"
        raise UserError(f"{origin}: no images for split {split!r} ({why}); choose another split")
    return None


def _check_classes(paths: list[list[str]], level: int, classes: list[str], origin: Path) -> None:
    """Raise UserError for images beside classes, splits inside them, or classes that differ only in case."""
    if stray := next((path for path in paths if len(path) == level + 1), None):
        name = "/".join(stray)
        raise UserError(f"{origin}: image {name!r} lies beside class folders; move it into one, or all out of them")
    inside = {"/".join(path[: i + 1]) for path in paths for i in range(level + 1, len(path) - 1) if _is_split(path[i])}
    if all(map(_is_split, classes)):
        inside |= {"/".join(path[: level + 1]) for path in paths}
    if inside:
        raise UserError(
            f"{origin}: {some(sorted(map(repr, inside)))} have names of splits, but lie inside classes or splits; "
            "give the folder above them alone, or rename them"
        )
    folded = Counter(map(str.casefold, classes))
    if twins := [repr(name) for name in classes if folded[name.casefold()] > 1]:
        raise UserError(f"{origin}: the classes {some(twins)} differ only in case; merge or rename them")

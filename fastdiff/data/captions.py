"""Captions of images: from metadata files and text files beside them, from arrays, or from class names by templates.

An image may have several captions; training draws one of them each time.
"""

import csv
import io
import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.data.files import Archive, Folder
from fastdiff.data.layout import some
from fastdiff.errors import UserError
from fastdiff.words import counted

Captions = tuple[tuple[str, ...], ...]  # of each image, at least one

METADATA = ("metadata.jsonl", "metadata.csv")
COLUMNS = "'file_name' (a string) and 'text' (a string; several lines for one image, or a list, are several captions)"
PLACEHOLDERS = ("{}", "{class}")


def caption_files(files: Folder | Archive) -> tuple[list[str], list[str]]:
    """Names of the files that hold captions: metadata files, and text files with the names of images."""
    others = files.listing.left_out
    stems = {_stem(name) for name in files.listing.images}
    tables = [*others.get("*.jsonl", ()), *others.get("*.csv", ())]
    metadata = [name for name in tables if posixpath.basename(name) in METADATA]
    return metadata, [name for name in others.get("*.txt", ()) if _stem(name) in stems]


def read_captions(files: Folder | Archive, images: Sequence[str]) -> Captions:
    """The captions that lie beside images.

    They are either in `metadata.jsonl` or `metadata.csv`, in the folder of the images or above it, with the columns
    `file_name` (relative to the metadata file) and `text`; or in a `.txt` beside each image, one caption a line.

    Args:
        images: names of the images to caption, with "/".

    Raises:
        UserError: no captions, both kinds, an image without a caption or a caption without its image, or a file that
            is not as described; names the file and the line.
    """
    metadata, sidecars = caption_files(files)
    metadata, stems = [name for name in metadata if _is_above(name, images)], {_stem(name) for name in images}
    sidecars = [name for name in sidecars if _stem(name) in stems]
    if metadata and sidecars:
        raise UserError(f"{files.path}: captions are in {metadata[0]!r} and in {sidecars[0]!r}; remove one kind")
    if not metadata and not sidecars:
        raise UserError(
            f"{files.path}: no captions beside its images; add metadata.jsonl or metadata.csv with {COLUMNS}, or a "
            ".txt beside each image, or build captions from class names by a file of templates"
        )
    captions = _from_metadata(files, metadata) if metadata else _from_sidecars(files, sidecars, images)
    if missing := [repr(image) for image in images if not captions.get(image)]:
        raise UserError(
            f"{files.path}: no caption for {len(missing):,} of {counted(len(images), 'image')}: {some(missing)}; "
            "add captions, or remove the images"
        )
    return tuple(tuple(captions[image]) for image in images)


def npz_captions(path: Path, captions: np.ndarray, n: int) -> Captions:
    """An array's captions, strings (n,), or (n, K) where an image may have fewer than K, and "" for the others.

    Raises:
        UserError: another shape or type, invalid UTF-8, or an image without a caption.
    """
    if captions.dtype.kind not in "US" or captions.ndim not in (1, 2) or len(captions) != n:
        raise UserError(f"{path}: 'captions' is {captions.dtype} {captions.shape}; expected strings ({n},) or ({n}, K)")
    result = []
    for i, row in enumerate(captions.tolist()):
        where = f"{path}: 'captions' of image {i}"
        row = row if captions.ndim == 2 else [row]
        texts = [text if isinstance(text, str) else _text(text, where) for text in row]
        result.append(tuple(_caption(text, where) for text in texts if text.strip()) or (_caption("", where),))
    return tuple(result)


def caption_templates(path: Path, class_names: Sequence[str]) -> Captions:
    """The captions of each class, by a file of templates: one a line, with `{}` or `{class}` for the class's name.

    Raises:
        UserError: the file cannot be read or has no template, or a line no place for the name; names file and line.
    """
    try:
        lines = _text(path.read_bytes(), str(path)).splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; expected a file of templates, one a line") from error
    templates = {number: line for number, line in enumerate(lines, 1) if line.strip()}
    for number, line in templates.items():
        places = re.findall(r"\{[^{}]*\}|[{}]", line)
        strange = [place for place in places if place not in PLACEHOLDERS]
        if strange or not places:
            why = f"{strange[0]!r} stands for nothing" if strange else f"no place for the class in {line!r}"
            raise UserError(f"{path}, line {number}: {why}; write {' or '.join(PLACEHOLDERS)}")
    if not templates:
        raise UserError(f"{path} has no template; write one a line, such as: a picture of a {{class}}")
    return tuple(
        tuple(_caption(line.replace("{class}", "{}").replace("{}", name), str(path)) for line in templates.values())
        for name in class_names
    )


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _is_above(name: str, images: Sequence[str]) -> bool:
    """Whether an image lies in the folder of the file `name`, at any depth."""
    folder = posixpath.join(posixpath.dirname(name), "")
    return any(image.startswith(folder) for image in images)


def _from_metadata(files: Folder | Archive, names: Sequence[str]) -> dict[str, list[str]]:
    known, captions = set(files.listing.images), {}
    for name, content in _contents(files, names):
        where, rows = f"{files.path}: {name!r}", defaultdict(list)
        for line, file_name, text in _metadata_rows(name, content, where):
            image = posixpath.normpath(posixpath.join(posixpath.dirname(name), file_name))
            if image not in known:
                raise UserError(f"{where}, line {line}: there is no image {image!r}; remove the line or add the image")
            rows[image].append(_caption(text, f"{where}, line {line}"))
        if twice := sorted(rows.keys() & captions.keys()):
            raise UserError(f"{where} and another metadata file caption {twice[0]!r}; remove it from one of them")
        captions |= rows
    return captions


def _from_sidecars(files: Folder | Archive, names: Sequence[str], images: Sequence[str]) -> dict[str, list[str]]:
    captions = {}
    for name, content in _contents(files, names):
        where = f"{files.path}: {name!r}"
        lines = enumerate(_text(content, where).split("\n"), 1)
        captions[_stem(name)] = [_caption(text, f"{where}, line {line}") for line, text in lines if text.strip()]
    return {image: captions.get(_stem(image), []) for image in images}


def _contents(files: Folder | Archive, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for name, content in files.read(names):
        try:
            content = content.read_bytes() if isinstance(content, Path) else content
        except OSError as error:
            content = error
        if isinstance(content, Exception):
            raise UserError(f"{files.path}: {name!r} cannot be read: {content}; mend it or remove it")
        yield name, content


def _text(content: bytes, where: str) -> str:
    """UTF-8, with or without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise UserError(f"{where}, line {line}: byte {byte:#04x} is not UTF-8; save it as UTF-8") from error


def _caption(text: str, where: str) -> str:
    """The text as one line. Raises UserError if it is empty, or if UTF-8 cannot encode it."""
    text = " ".join(text.split())
    if not text:
        raise UserError(f"{where}: the caption is empty; write one, or remove the image")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{where}: the caption {text!r} holds half a character (a surrogate); mend it")
    return text


def _metadata_rows(name: str, content: bytes, where: str) -> Iterator[tuple[int, str, str]]:
    """(line, file_name, text) of each caption."""
    read = _json_rows if name.endswith(".jsonl") else _csv_rows
    for line, row in read(_text(content, where), where):
        image, text = row.get("file_name"), row.get("text")
        texts: list[Any] = text if isinstance(text, list) else [text]
        if not isinstance(image, str) or not texts or not all(isinstance(each, str) for each in texts):
            found = some(list(map(str, row))) or "nothing"
            raise UserError(f"{where}, line {line}: expected {COLUMNS}, but it has {found}")
        for each in texts:
            yield line, image, each


def _json_rows(text: str, where: str) -> Iterator[tuple[int, dict]]:
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}, line {line}: it is not JSON ({error}); write one object a line") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}, line {line}: it is no object; expected {COLUMNS}")
            yield line, row


def _csv_rows(text: str, where: str) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}: it is not CSV ({error}); mend the line") from error

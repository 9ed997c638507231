"""Images in a folder, a tar or a zip archive: which files there are, what is in them, and which labels they get."""

import hashlib
import lzma
import os
import stat
import tarfile
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fastdiff.data.decoding import in_parallel
from fastdiff.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
SPLITS = {"train", "test", "val", "valid", "validation"}  # top-level folders that are splits, not classes
MAX_HEADER_BYTES = 2**20  # of a tar's extended header, which holds a long name
_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"X")  # X: Solaris
MAX_MEMBER_BYTES = 2**28  # of one image in an archive
MAX_UNPACKED_BYTES = 2**32  # of an archive as a whole, or
MAX_UNPACKED_RATIO = 100  # this many times its own size, if that is more: beyond, it is made to do harm


def choose(names: list[str], split: str, origin: Path) -> tuple[list[str], list[int] | None]:
    """The files of one split and their labels, or None where there are no classes.

    - Folders that wrap everything are looked through: `pets/cat/1.png, pets/dog/2.png` is read as `cat/1.png, ...`.
    - If the top-level folders are splits (`SPLITS`), the files under `split`; otherwise everything is "train".
    - Files directly there have no labels. Subfolders are classes, numbered in the sorted order of the classes of all
      splits; what lies deeper belongs to the class above it.

    Raises:
        UserError: no images, no such split, or images beside class folders.
    """
    if not names:
        raise UserError(f"{origin}: no images in it; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
    paths = [name.split("/") for name in names]
    top = 0
    while len({path[top] for path in paths}) == 1 < len(paths) and paths[0][top] not in SPLITS:
        top += 1
    tops = {path[top] for path in paths}
    has_splits = tops <= SPLITS
    if has_splits:
        chosen = [i for i, path in enumerate(paths) if path[top] == split]
        top += 1
    else:
        chosen = list(range(len(names))) if split == "train" else []
    if not chosen:
        found = f"it has {', '.join(sorted(tops))}" if has_splits else "without folders train/ and test/ all is 'train'"
        raise UserError(f"{origin}: no images for split {split!r} ({found}); choose another split")
    stray = next((names[i] for i in chosen if len(paths[i]) == top + 1), None)
    classes = sorted({path[top] for path in paths if len(path) > top + 1})
    if not classes:
        return [names[i] for i in chosen], None
    if stray is not None:
        raise UserError(f"{origin}: image {stray!r} lies beside class folders; move it into one, or all out of them")
    number = {name: i for i, name in enumerate(classes)}
    return [names[i] for i in chosen], [number[paths[i][top]] for i in chosen]


def _is_image(parts: list[str]) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].lower().endswith(IMAGE_SUFFIXES)


@contextmanager
def _reported(path: Path) -> Generator[None]:
    """Turn what reading a damaged file raises into a UserError."""
    try:
        yield
    except (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
        raise UserError(f"{path} cannot be read: {reason}; mend its permissions, or copy or pack it again") from error


class Folder:
    """Image files in a folder and its subfolders, under relative names; symbolic links are followed, loops are not."""

    def __init__(self, path: Path):
        self.path = path

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all image files and their names."""
        names = self.names()
        total = hashlib.sha256()
        with _reported(self.path):
            for digest in in_parallel(self._digest, names, len(names), "looking for changes"):
                total.update(digest)
        return total.hexdigest()

    def _digest(self, name: str) -> bytes:
        return hashlib.sha256(os.fsencode(name) + b"\0" + (self.path / name).read_bytes()).digest()

    def names(self) -> list[str]:
        """All image files, sorted; other files, hidden ones, pipes and devices are passed over."""
        found, seen = [], set()
        with _reported(self.path):
            for directory, subfolders, files in os.walk(self.path, followlinks=True, onerror=_raise):
                if (real := os.path.realpath(directory)) in seen:
                    subfolders.clear()
                    continue
                seen.add(real)
                inside = list(Path(directory).relative_to(self.path).parts)
                images = [file for file in files if _is_image([*inside, file]) and not _is_special(directory, file)]
                found += ["/".join([*inside, file]) for file in images]
        return sorted(found)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | Path]]:
        """(name, file) of each; the file is read where it is decoded."""
        return ((name, self.path / name) for name in names)


def _is_special(directory: str, file: str) -> bool:
    """A pipe or device, which may be read without end; a link that leads nowhere is none, and is complained of."""
    path = os.path.join(directory, file)
    return os.path.exists(path) and not os.path.isfile(path)


def _raise(error: OSError) -> None:
    raise error


class Archive(ABC):
    """Image files in a tar or zip archive, read in place: nothing is unpacked to disk.

    Only plain files with safe names count. Links, devices, absolute names and names with `..` are ignored with a
    warning.
    """

    def __init__(self, path: Path):
        self.path = path
        self._members: dict[str, Any] = {}  # name -> TarInfo or ZipInfo

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the archive."""
        with _reported(self.path), open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def names(self) -> list[str]:
        """All image files, sorted; other files and hidden ones are passed over."""
        ignored = 0
        with _reported(self.path):
            left = max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * self.path.stat().st_size)
            for name, size, kind, member in self._list():
                left -= size
                if left < 0:
                    raise UserError(
                        f"{self.path} unpacks to over {MAX_UNPACKED_RATIO} times its size; pack only images"
                    )
                parts = [part for part in name.split("/") if part not in ("", ".")]
                if kind == "folder" or not parts:
                    continue
                if kind == "other" or name.startswith("/") or ".." in parts:
                    ignored += 1
                elif _is_image(parts):
                    name = "/".join(parts)
                    if size > MAX_MEMBER_BYTES:
                        raise UserError(
                            f"{self.path}: {name!r} has {size} bytes, more than {MAX_MEMBER_BYTES}; shrink it"
                        )
                    self._members[name] = member
        if ignored:
            warnings.warn(f"{self.path}: {ignored} links, devices or paths outside of it are ignored", stacklevel=2)
        return sorted(self._members)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | Path]]:
        """(name, content) of each, in the order of the archive, so that a compressed tar is gone through once."""
        with _reported(self.path):
            yield from self._read({name: self._members[name] for name in names})

    @abstractmethod
    def _list(self) -> Iterator[tuple[str, int, Literal["file", "folder", "other"], Any]]:
        """Name, size, kind and record of each member."""

    @abstractmethod
    def _read(self, members: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
        """Name and content of each of these, in the order of the archive."""


class _ShortHeaders(tarfile.TarInfo):
    """Refuses what tarfile reads into memory, however large: extended headers (long names, pax records) that are too
    long for any name, and the maps of sparse files."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENDED and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size} bytes, more than {MAX_HEADER_BYTES}")
        return header

    def _no_sparse(self, *_: Any) -> Any:
        """A sparse file's map may be of any length, and tarfile reads it at once."""
        raise RuntimeError("it has sparse files, which are not read")  # not a ReadError, which tarfile replaces

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _no_sparse


class Tar(Archive):
    """A tar archive, plain or compressed by gzip, bzip2 or xz."""

    def _list(self) -> Iterator[tuple[str, int, Literal["file", "folder", "other"], tarfile.TarInfo]]:
        with tarfile.open(self.path, tarinfo=_ShortHeaders) as tar:
            for member in tar:
                kind = "file" if member.isfile() else "folder" if member.isdir() else "other"
                yield member.name, member.size, kind, member
            # tarfile takes a damaged or missing header for the end; the true end is two blocks of zeros.
            block: Any = tar.fileobj
            if block.tell() != tar.offset + tarfile.BLOCKSIZE or block.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("it is damaged or truncated")

    def _read(self, members: dict[str, tarfile.TarInfo]) -> Iterator[tuple[str, bytes]]:
        with tarfile.open(self.path) as tar:
            for name in sorted(members, key=lambda name: members[name].offset_data):
                file = tar.extractfile(members[name])
                assert file is not None  # only plain files are members
                yield name, file.read()


class Zip(Archive):
    """A zip archive."""

    def _list(self) -> Iterator[tuple[str, int, Literal["file", "folder", "other"], zipfile.ZipInfo]]:
        with zipfile.ZipFile(self.path) as archive:
            for member in archive.infolist():
                mode = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive comes from no Unix
                kind = "folder" if member.is_dir() else "file" if mode in (0, stat.S_IFREG) else "other"
                yield member.filename, member.file_size, kind, member

    def _read(self, members: dict[str, zipfile.ZipInfo]) -> Iterator[tuple[str, bytes]]:
        with zipfile.ZipFile(self.path) as archive:
            for name in sorted(members, key=lambda name: members[name].header_offset):
                yield name, archive.read(members[name])


def open_files(path: Path) -> Folder | Archive:
    """The image files of a folder or an archive.

    Raises:
        UserError: neither a folder nor a known kind of archive.
    """
    name = path.name.lower()
    if path.is_dir():
        return Folder(path)
    if name.endswith(TAR_SUFFIXES):
        return Tar(path)
    if name.endswith(".zip"):
        return Zip(path)
    kinds = ", ".join((*TAR_SUFFIXES, ".zip"))
    raise UserError(f"{path} is no data set; expected a folder of images, a .npz file, or an archive ({kinds})")

"""Images in a folder, a tar or a zip archive: which files there are, and what is in them."""

import hashlib
import heapq
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fastdiff.data.decoding import in_parallel
from fastdiff.data.layout import Listing, is_hidden, some, sort_out
from fastdiff.errors import UserError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
MAX_HEADER_BYTES = 2**20  # of a tar's extended header, which holds a long name
_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"X")  # X: Solaris
MAX_MEMBER_BYTES = 2**28  # of one image in an archive
MAX_UNPACKED_BYTES = 2**32  # of an archive as a whole, or
MAX_UNPACKED_RATIO = 100  # this many times its own size, if that is more: beyond, it is made to do harm
_UNREADABLE = (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error)

Members = Iterator[tuple[str, int, Literal["file", "folder", "other"], Any]]  # name, size, kind and record
Contents = Iterator[tuple[str, bytes | Exception]]  # name and content, or the error that only this member has


@contextmanager
def _reported(path: Path) -> Generator[None]:
    """Turn what reading a damaged file raises into a UserError."""
    try:
        yield
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
        raise UserError(f"{path} cannot be read: {reason}; mend its permissions, or copy or pack it again") from error


class Folder:
    """Image files in a folder and its subfolders, under relative names.

    Symbolic links are followed, after all that really lies in the folder; one to a folder that is read already is not.
    """

    def __init__(self, path: Path):
        self.path = path

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all image files and their names; never the same twice where one cannot be read."""
        names = self.listing.images
        total = hashlib.sha256()
        for digest in in_parallel(self._digest, names, len(names), "looking for changes"):
            total.update(digest)
        return total.hexdigest()

    def _digest(self, name: str) -> bytes:
        try:
            content = (self.path / name).read_bytes()
        except OSError:  # who decodes it names it, with all others
            return os.urandom(32)
        return hashlib.sha256(os.fsencode(name) + b"\0" + content).digest()

    @cached_property
    def listing(self) -> Listing:
        """The image files, as found when first asked for. Raises UserError if a folder cannot be read."""
        names: list[str] = []
        left_out: defaultdict[str, list[str]] = defaultdict(list)
        folders, links = [""], []  # still to read: folders that really lie there, and a heap of links to folders
        seen, bad = set(), []
        while folders or links:
            inside = folders.pop() if folders else heapq.heappop(links)
            directory = os.path.join(self.path, inside)
            try:
                real = os.path.realpath(directory)
                if real in seen:
                    left_out["links to folders that are read already"].append(inside)
                    continue
                seen.add(real)
                for entry in os.scandir(directory):
                    name = f"{inside}{entry.name}"
                    if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry)):  # who reads it complains
                        names.append(name)
                    elif not entry.is_dir():
                        left_out["pipes or devices"].append(name)
                    elif is_hidden(entry.name):
                        names.append(f"{name}/")
                    elif entry.is_symlink():
                        heapq.heappush(links, f"{name}/")
                    else:
                        folders.append(f"{name}/")
            except OSError as error:
                bad.append(f"{directory!r} ({error.strerror})")
        if bad:
            raise UserError(f"{self.path} cannot be read: {some(sorted(bad), 10)}; mend the permissions")
        return sort_out(names, left_out)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | Path | Exception]]:
        """(name, file) of each; the file is read where it is decoded."""
        return ((name, self.path / name) for name in names)


class Archive:
    """Image files in an archive, read in place by `members` and `contents`: nothing is unpacked to disk.

    Only plain files with safe names count; links, devices, absolute names and names with `..` are left out.
    """

    def __init__(self, path: Path, members: Callable[[Path], Members], contents: Callable[[Path, dict], Contents]):
        self.path, self._list, self._contents = path, members, contents
        self._members: dict[str, Any] = {}  # name -> record

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the archive."""
        with _reported(self.path), open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def listing(self) -> Listing:
        """The image files. Raises UserError if the archive is damaged, or made to fill the memory."""
        left_out: defaultdict[str, list[str]] = defaultdict(list)
        sizes: dict[str, int] = {}
        with _reported(self.path):
            left = max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * self.path.stat().st_size)
            for name, size, kind, member in self._list(self.path):
                left -= size
                if left < 0:
                    raise UserError(
                        f"{self.path} unpacks to over {MAX_UNPACKED_RATIO} times its size; pack only images"
                    )
                name = name.replace("\\", "/")  # as Windows writes it
                parts = [part for part in name.split("/") if part not in ("", ".")]
                if kind == "folder" or name.endswith("/") or not parts:
                    continue
                if kind == "other" or re.match("/|[A-Za-z]:/", name) or ".." in parts:
                    left_out["links, devices or paths outside of it"].append(name)
                    continue
                name = "/".join(parts)
                if name in sizes:
                    left_out["older files of the same name"].append(name)
                sizes[name], self._members[name] = size, member
        listing = sort_out(sizes, left_out)
        for name in listing.images:
            if (size := sizes[name]) > MAX_MEMBER_BYTES:
                raise UserError(f"{self.path}: {name!r} has {size} bytes, more than {MAX_MEMBER_BYTES}; shrink it")
        return listing

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | Path | Exception]]:
        """(name, content or error) of each, in the order of the archive, so that a tar is gone through once."""
        with _reported(self.path):
            yield from self._contents(self.path, {name: self._members[name] for name in names})


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


def _tar_members(path: Path) -> Members:
    with tarfile.open(path, tarinfo=_ShortHeaders) as tar:
        for member in tar:
            kind = "file" if member.isfile() else "folder" if member.isdir() else "other"
            yield member.name, member.size, kind, member
        # tarfile takes a damaged or missing header for the end; the true end is two blocks of zeros.
        block: Any = tar.fileobj
        if block.tell() != tar.offset + tarfile.BLOCKSIZE or block.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("it is damaged or truncated")


def _tar_contents(path: Path, members: dict[str, tarfile.TarInfo]) -> Contents:
    with tarfile.open(path) as tar:
        for name in sorted(members, key=lambda name: members[name].offset_data):
            file = tar.extractfile(members[name])
            assert file is not None  # only plain files are members
            yield name, file.read()


def _zip_members(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            mode = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive comes from no Unix
            kind = "folder" if member.is_dir() else "file" if mode in (0, stat.S_IFREG) else "other"
            yield member.filename, member.file_size, kind, member


def _zip_contents(path: Path, members: dict[str, zipfile.ZipInfo]) -> Contents:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(members, key=lambda name: members[name].header_offset):
            try:
                content: bytes | Exception = archive.read(members[name])
            except _UNREADABLE as error:
                content = error
            yield name, content


def open_files(path: Path) -> Folder | Archive:
    """The image files of a folder or an archive. Raises UserError for anything else."""
    name = path.name.lower()
    if path.is_dir():
        return Folder(path)
    if name.endswith(TAR_SUFFIXES):
        return Archive(path, _tar_members, _tar_contents)
    if name.endswith(".zip"):
        return Archive(path, _zip_members, _zip_contents)
    kinds = ", ".join((*TAR_SUFFIXES, ".zip"))
    raise UserError(f"{path} is no data set; expected a folder of images, a .npz file, or an archive ({kinds})")

"""Which files of folders and archives are taken, what labels they get, and what is refused."""

import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastdiff.data import files
from fastdiff.data.files import choose, open_files

SUFFIXES = [".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip"]
PETS = ["cat/x.png", "cat/y.png", "cat/z.png", "dog/a.png", "dog/b.PNG"]


def content(source) -> dict[str, bytes]:
    read = dict(source.read(source.names()))
    return {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in read.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_folders_and_archives_hold_the_same(pets, pack, suffix):
    folder, archive = open_files(pets), open_files(pack(pets, suffix))
    assert folder.names() == archive.names() == PETS
    assert content(folder) == content(archive)


def test_fingerprints_follow_the_content(pets, pack):
    before = open_files(pets).fingerprint()
    os.utime(pets / "cat" / "x.png")
    assert open_files(pets).fingerprint() == before
    (pets / "cat" / "z.png").rename(pets / "dog" / "0.png")  # another label, the same order
    moved = open_files(pets).fingerprint()
    (pets / "dog" / "0.png").write_bytes(b"other")
    assert len({before, moved, open_files(pets).fingerprint()}) == 3
    first = open_files(pack(pets, ".zip")).fingerprint()
    (pets / "dog" / "0.png").unlink()
    assert open_files(pack(pets, ".zip")).fingerprint() != first


@pytest.mark.parametrize(
    ("names", "split", "chosen", "labels"),
    [
        (["a.png", "b.png"], "train", ["a.png", "b.png"], None),
        (["cat/a.png", "dog/b.png"], "train", ["cat/a.png", "dog/b.png"], [0, 1]),
        (["pets/cat/a.png", "pets/dog/b.png"], "train", ["pets/cat/a.png", "pets/dog/b.png"], [0, 1]),
        (["x/y/a.png", "x/y/b.png"], "train", ["x/y/a.png", "x/y/b.png"], None),
        (["cat/old/a.png", "cat/b.png", "dog/c.png"], "train", ["cat/old/a.png", "cat/b.png", "dog/c.png"], [0, 0, 1]),
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
        (["bus/1.png", "train/2.png"], "train", ["bus/1.png", "train/2.png"], [0, 1]),
        (["one.png"], "train", ["one.png"], None),
        (["cat/one.png"], "train", ["cat/one.png"], [0]),
    ],
)
def test_choose(names, split, chosen, labels):
    assert choose(names, split, Path("set")) == (chosen, labels)


def test_choose_refuses(user_error):
    user_error(lambda: choose([], "train", Path("set")), "set", "no images", ".png")
    user_error(lambda: choose(["cat/a.png", "dog/b.png"], "test", Path("set")), "set", "'test'", "train")
    user_error(lambda: choose(["train/a.png", "train/b.png"], "test", Path("set")), "set", "'test'", "it has train")
    user_error(lambda: choose(["cat/a.png", "b.png"], "train", Path("set")), "set", "b.png", "class folders")
    user_error(lambda: choose(["test/cat/a.png", "train/b.png"], "train", Path("set")), "train/b.png")


def test_links_in_a_folder_are_followed_but_loops_are_not(tmp_path, pets):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "cat").symlink_to(pets / "cat")
    (linked / "loop").symlink_to(linked)
    (linked / "dead.png").symlink_to(tmp_path / "nowhere")
    assert open_files(linked).names() == ["cat/x.png", "cat/y.png", "cat/z.png", "dead.png"]
    with pytest.raises(files.UserError, match=r"dead\.png"):
        open_files(linked).fingerprint()


def test_pipes_and_devices_in_a_folder_are_passed_over(tmp_path):
    (tmp_path / "a.png").write_bytes(b"an image")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    folder = open_files(tmp_path)
    assert folder.names() == ["a.png"]
    assert folder.fingerprint()


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_sparse_members_are_refused_before_their_maps_are_read(tmp_path, user_error, version):
    path = tmp_path / "sparse.tar.gz"
    major, minor = version.split(".")
    headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1"}
    if version == "1.0":
        headers = {"GNU.sparse.major": major, "GNU.sparse.minor": minor, "GNU.sparse.realsize": "1"}
    elif version == "0.0":
        headers = {"GNU.sparse.size": "1", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "1"}
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.png")
        member.size, member.pax_headers = 512, headers
        archive.addfile(member, io.BytesIO(b"1\n0\n1\n".ljust(512, b"\0")))
    user_error(open_files(path).names, "sparse.tar.gz", "sparse files, which are not read")


def add(archive: tarfile.TarFile, name: str, kind=tarfile.REGTYPE, link="", data=b"data") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.size = len(data) if kind == tarfile.REGTYPE else 0
    archive.addfile(member, io.BytesIO(data))


def test_unsafe_members_are_ignored_with_a_warning(tmp_path):
    path = tmp_path / "unsafe.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "./good/a.png")
        add(archive, "symlink.png", tarfile.SYMTYPE, "/etc/passwd")
        add(archive, "hardlink.png", tarfile.LNKTYPE, "good/a.png")
        add(archive, "device.png", tarfile.CHRTYPE)
        add(archive, "fifo.png", tarfile.FIFOTYPE)
        add(archive, "/absolute/b.png")
        add(archive, "good/../../up.png")
    with pytest.warns(UserWarning, match=r"unsafe.tar: 6 links, devices or paths outside"):
        assert content(open_files(path)) == {"good/a.png": b"data"}
    assert list(tmp_path.iterdir()) == [path]


def test_unsafe_members_of_a_zip_are_ignored(tmp_path):
    path = tmp_path / "unsafe.zip"
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"data")
        archive.writestr("../b.png", b"data")
        archive.writestr("/c.png", b"data")
        archive.writestr(link, "/etc/passwd")
    with pytest.warns(UserWarning, match="3 links"):
        assert open_files(path).names() == ["a.png"]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_size_bombs_are_refused_from_their_headers(tmp_path, monkeypatch, suffix, user_error):
    folder = tmp_path / "zeros"
    folder.mkdir()
    (folder / "0.bin").write_bytes(bytes(3_000_000))
    (folder / "1.png").write_bytes(bytes(1000))
    path = tmp_path / f"zeros{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in folder.iterdir():
                archive.write(file, file.name)
    else:
        with tarfile.open(path, "w:" + suffix[5:]) as archive:
            archive.add(folder, ".")
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 1_000_000)
    if suffix == ".tar":  # not compressed: it cannot be a bomb
        assert open_files(path).names() == ["1.png"]
    else:
        user_error(lambda: open_files(path).names(), path.name, "100 times")
    monkeypatch.undo()
    monkeypatch.setattr(files, "MAX_MEMBER_BYTES", 999)
    user_error(lambda: open_files(path).names(), path.name, "1.png", "1000 bytes")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("part", [0.3, 0.6])
def test_truncated_archives(pets, pack, suffix, part, user_error):
    path = pack(pets, suffix)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    user_error(lambda: content(open_files(path)), path.name, "cannot be read")


@pytest.mark.parametrize("cut", [0, 100, 511])
def test_a_tar_cut_in_or_before_a_header_is_not_taken_for_complete(pets, pack, cut, user_error):
    path = pack(pets, ".tar")
    with tarfile.open(path) as archive:
        last = max(member.offset for member in archive)
    path.write_bytes(path.read_bytes()[: last + cut])
    user_error(lambda: open_files(path).names(), path.name, "truncated")


def test_a_tar_with_a_damaged_header_inside_is_not_taken_for_complete(pets, pack, user_error):
    path = pack(pets, ".tar")
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        data[max(member.offset for member in archive) + 3] ^= 1
    path.write_bytes(data)
    user_error(lambda: open_files(path).names(), path.name, "damaged")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_no_archive(tmp_path, suffix, user_error):
    path = tmp_path / f"text{suffix}"
    path.write_text("no archive " * 100)
    user_error(lambda: open_files(path).names(), path.name, "cannot be read")


def test_an_encrypted_zip_and_a_damaged_member(pets, pack, user_error):
    path = pack(pets, ".zip")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"IDAT") + 20] ^= 1
    path.write_bytes(data)
    user_error(lambda: content(open_files(path)), path.name, "CRC")
    data = path.read_bytes().replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00")
    assert data != path.read_bytes()
    path.write_bytes(data)
    user_error(lambda: content(open_files(path)), path.name, "cannot be read")


def test_unknown_kinds_of_file(tmp_path, user_error):
    (tmp_path / "one.png").write_bytes(b"")
    user_error(lambda: open_files(tmp_path / "one.png"), "one.png", "folder of images", ".tar.xz", ".npz")

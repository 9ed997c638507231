"""Which files of folders and archives are taken, which are passed over, and what is refused."""

import io
import os
import stat
import tarfile
import zipfile

import pytest

from fastdiff.data import files
from fastdiff.data.files import open_files

SUFFIXES = [".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip"]
PETS = ["cat/x.png", "cat/y.png", "cat/z.png", "dog/a.png", "dog/b.PNG"]


def content(source) -> dict[str, bytes]:
    read = dict(source.read(source.listing.images))
    if errors := [data for data in read.values() if isinstance(data, Exception)]:
        raise errors[0]
    return {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in read.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_folders_and_archives_hold_the_same(pets, pack, suffix):
    folder, archive = open_files(pets), open_files(pack(pets, suffix))
    assert folder.listing.images == archive.listing.images == PETS
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


def test_links_in_a_folder_are_followed_but_loops_are_not(tmp_path, pets):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "cat").symlink_to(pets / "cat")
    (linked / "loop").symlink_to(linked)
    (linked / "dead.png").symlink_to(tmp_path / "nowhere")
    assert open_files(linked).listing.images == ["cat/x.png", "cat/y.png", "cat/z.png", "dead.png"]
    assert open_files(linked).listing.left_out["links to folders that are read already"] == ["loop/"]
    assert open_files(linked).fingerprint() != open_files(linked).fingerprint()  # it cannot be read: nothing is cached


def test_the_second_link_to_a_folder_is_named_and_what_really_lies_there_comes_first(tmp_path, pets):
    (pets / "a-link").symlink_to(pets / "cat")
    (pets / "m-link").symlink_to(tmp_path / "elsewhere")
    (pets / "z-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").touch()
    listing = open_files(pets).listing
    assert listing.images == [*PETS, "m-link/1.png"]
    assert listing.left_out["links to folders that are read already"] == ["a-link/", "z-link/"]


def test_folders_that_cannot_be_read_are_named_together(pets, monkeypatch, user_error):
    scan = os.scandir

    def denied(path):
        if str(path).endswith(("cat/", "dog/", ".hidden/")):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    message = user_error(lambda: open_files(pets).listing, "cat/' (Permission denied)", "dog/' (Permission denied)")
    assert ".hidden" not in message


def test_archives_made_on_windows(tmp_path):
    """Backslashes are separators, in folders' own entries too; hidden files below them are hidden."""
    path = tmp_path / "windows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("train\\", "train\\cat\\0.png", "test\\cat\\1.png", "train\\cat\\._0.png", ".\\train\\dog\\2.png"):
            archive.writestr(name, b"data")
        archive.writestr("C:\\Windows\\3.png", b"data")
        archive.writestr("train\\..\\4.png", b"data")
    listing = open_files(path).listing
    assert listing.images == ["test/cat/1.png", "train/cat/0.png", "train/dog/2.png"]
    assert listing.left_out == {
        "links, devices or paths outside of it": ["C:/Windows/3.png", "train/../4.png"],
        "hidden": ["train/cat/._0.png"],
    }
    assert content(open_files(path)) == dict.fromkeys(listing.images, b"data")


def test_of_two_members_of_one_name_the_later_counts(tmp_path):
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "cat/a.png", data=b"old")
        add(archive, "./cat/a.png", data=b"new")
    assert content(open_files(path)) == {"cat/a.png": b"new"}
    assert open_files(path).listing.left_out == {"older files of the same name": ["cat/a.png"]}


def test_pipes_and_devices_in_a_folder_are_passed_over(tmp_path):
    (tmp_path / "a.png").write_bytes(b"an image")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    folder = open_files(tmp_path)
    assert folder.listing.images == ["a.png"]
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
    user_error(lambda: open_files(path).listing, "sparse.tar.gz", "sparse files, which are not read")


def add(archive: tarfile.TarFile, name: str, kind=tarfile.REGTYPE, link="", data=b"data") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.size = len(data) if kind == tarfile.REGTYPE else 0
    archive.addfile(member, io.BytesIO(data))


def test_unsafe_members_are_left_out(tmp_path):
    path = tmp_path / "unsafe.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "./good/a.png")
        add(archive, "symlink.png", tarfile.SYMTYPE, "/etc/passwd")
        add(archive, "hardlink.png", tarfile.LNKTYPE, "good/a.png")
        add(archive, "device.png", tarfile.CHRTYPE)
        add(archive, "fifo.png", tarfile.FIFOTYPE)
        add(archive, "/absolute/b.png")
        add(archive, "good/../../up.png")
    assert content(open_files(path)) == {"good/a.png": b"data"}
    assert len(open_files(path).listing.left_out["links, devices or paths outside of it"]) == 6
    assert list(tmp_path.iterdir()) == [path]


def test_unsafe_members_of_a_zip_are_left_out(tmp_path):
    path = tmp_path / "unsafe.zip"
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"data")
        archive.writestr("../b.png", b"data")
        archive.writestr("/c.png", b"data")
        archive.writestr(link, "/etc/passwd")
    listing = open_files(path).listing
    assert listing.images == ["a.png"]
    assert listing.left_out == {"links, devices or paths outside of it": ["../b.png", "/c.png", "link.png"]}


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
        assert open_files(path).listing.images == ["1.png"]
    else:
        user_error(lambda: open_files(path).listing.images, path.name, "100 times")
    monkeypatch.undo()
    monkeypatch.setattr(files, "MAX_MEMBER_BYTES", 999)
    user_error(lambda: open_files(path).listing.images, path.name, "1.png", "1000 bytes")


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
    user_error(lambda: open_files(path).listing.images, path.name, "truncated")


def test_a_tar_with_a_damaged_header_inside_is_not_taken_for_complete(pets, pack, user_error):
    path = pack(pets, ".tar")
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        data[max(member.offset for member in archive) + 3] ^= 1
    path.write_bytes(data)
    user_error(lambda: open_files(path).listing.images, path.name, "damaged")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_no_archive(tmp_path, suffix, user_error):
    path = tmp_path / f"text{suffix}"
    path.write_text("no archive " * 100)
    user_error(lambda: open_files(path).listing.images, path.name, "cannot be read")


def test_an_encrypted_zip_and_a_damaged_member(pets, pack, user_error):
    path = pack(pets, ".zip")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"IDAT") + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        content(open_files(path))
    data = path.read_bytes().replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00")
    assert data != path.read_bytes()
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match="encrypted"):
        content(open_files(path))


def test_unknown_kinds_of_file(tmp_path, user_error):
    (tmp_path / "one.png").write_bytes(b"")
    user_error(lambda: open_files(tmp_path / "one.png"), "one.png", "folder of images", ".tar.xz", ".npz")

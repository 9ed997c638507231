"""Small image sets on disk, made anew for each test."""

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.errors import UserError


def save_image(path: Path, seed: int, size: tuple[int, int] = (8, 8)) -> None:
    """A random RGB image; PNG keeps its values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder of class subfolders: three cats, two dogs, and files that are no images of the set."""
    folder = tmp_path / "pets"
    for seed, name in enumerate(["dog/a.png", "cat/x.png", "cat/y.png", "dog/b.PNG", "cat/z.png"]):
        save_image(folder / name, seed)
    (folder / "README.txt").write_text("about pets")
    save_image(folder / ".hidden" / "h.png", 9)
    (folder / "cat" / "._x.png").write_bytes(b"what macOS leaves behind")
    return folder


@pytest.fixture
def split_pets(tmp_path: Path) -> Path:
    """A folder with train/ and test/; the class `dog` has no training images."""
    folder = tmp_path / "split-pets"
    for seed, name in enumerate(["train/cat/1.png", "train/eel/2.png", "test/cat/3.png", "test/dog/4.png"]):
        save_image(folder / name, seed)
    return folder


@pytest.fixture
def pack(tmp_path: Path):
    """pack(folder, suffix, inside="") -> an archive of the folder, below the folder `inside` in it."""

    def pack(folder: Path, suffix: str, inside: str = "") -> Path:
        path = tmp_path / f"{folder.name}{suffix}"
        if suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                for file in sorted(folder.rglob("*")):
                    archive.write(file, Path(inside) / file.relative_to(folder))
        else:
            compression = {"tar": "", "tgz": "gz"}.get(suffix.split(".")[-1], suffix.split(".")[-1])
            with tarfile.open(path, f"w:{compression}") as archive:
                archive.add(folder, inside or ".")
        return path

    return pack


@pytest.fixture
def user_error():
    """user_error(function, *parts): the call fails with one line that holds all the parts."""

    def user_error(function, *parts: str) -> str:
        with pytest.raises(UserError) as info:
            function()
        message = str(info.value)
        assert "\n" not in message
        for part in parts:
            assert str(part) in message
        return message

    return user_error

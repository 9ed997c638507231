"""Files that users name: checked before the work, and there only when they are complete."""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from fastdiff.errors import UserError
from fastdiff.runs.files import temporary_folder


def is_empty_folder(path: Path) -> bool:
    try:
        return not os.listdir(path)
    except OSError:
        return False


@contextmanager
def complete_folder(out: Path, *, flag: str = "--out ") -> Generator[Path]:
    """A folder to write in, whose content is moved to `out` in the end; after an error nothing is left.

    Raises UserError, which names the flag, if it cannot be written.
    """
    there = is_empty_folder(out)
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # An empty folder is filled, not replaced: it may be a mount, or where the user is.
        temporary = temporary_folder(out if there else out.parent, f".{out.name}-")
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # as the umask has it; safetensors writes for its owner alone
        for file in filter(Path.is_file, temporary.rglob("*")):
            file.chmod(mode)
        if there:
            for path in sorted(temporary.iterdir(), reverse=True):  # config.json or model_index.json last
                path.rename(out / path.name)
            temporary.rmdir()
        else:
            temporary.rename(out)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise UserError(f"{flag}{out} cannot be written: {error}.") from error
        raise


def check_output(path: Path) -> None:
    """Refuse, before the work, a file that could not be written after it."""
    folder = path.absolute().parent
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; name a file.")
    if not folder.is_dir():
        raise UserError(f"{path} cannot be written: the folder {folder} does not exist.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {folder} takes no files ({error.strerror}).") from error


@contextmanager
def npz_writer(path: Path | None, shape: tuple[int, ...], **arrays: np.ndarray) -> Generator[Any]:
    """A function that appends batches to `images` of an .npz, so that they are never all in memory; it also holds
    `arrays`."""
    if path is None:
        yield lambda batch: None
        return
    temporary = path.with_name(f".{path.name}.part")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("images.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                yield lambda batch: file.write(np.ascontiguousarray(batch).data)
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)

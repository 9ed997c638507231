"""Checkpoints: folders `step-N/` that are either whole and verified, or not there.

    step-N/model.safetensors      weights
    step-N/ema.safetensors        averaged weights
    step-N/optimizer.pt           optimizer state (torch.save; read with weights_only=True)
    step-N/manifest.json          step, sizes, SHA-256 of each file and of itself, and all else that is plain JSON

All files are written to a temporary folder and synced, the manifest last; then the folder is renamed. One flipped bit
loads silently with torch.load and with safetensors, so every file is checked against its SHA-256 before it is parsed,
both from one reading.
"""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.runs.files import sync, temporary_folder, write_synced
from fastdiff.words import counted

FORMAT = 1
_PARTS = {"model": "model.safetensors", "ema": "ema.safetensors", "optimizer": "optimizer.pt"}
_TEMPORARY = ".saving-"
_DELETED = ".deleted-"
_REPLACED = ".replaced"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read into CPU memory.

    `state` has what was given to `save`; `skipped` names newer checkpoints that did not verify, and why.
    """

    step: int
    state: dict[str, Any]
    path: Path
    skipped: list[tuple[Path, str]] = field(default_factory=list)


class Damaged(Exception):
    """A checkpoint that does not verify; the message says why."""


class NotSaved(OSError):
    """A checkpoint could not be written, most often because the disk is full; the older ones are untouched."""


def save(directory: Path | str, step: int, state: Mapping[str, Any]) -> Path:
    """Write `directory/step-N`, replacing one of the same step.

    Args:
        directory: made if missing; no other process may save there meanwhile.
        step: updates made so far.
        state: `model` and `ema`, mappings of tensors, whose keys must not carry a wrapper's prefix; `optimizer`, a
            state dict; anything else must be plain JSON and goes into the manifest.

    Returns:
        The checkpoint's folder; the disk has it, and a power cut does not lose it.

    Raises:
        NotSaved: the disk is full, or fails otherwise; it names the free and the needed bytes, and nothing is left.
    """
    directory = Path(directory)
    written = 0
    try:
        directory.mkdir(parents=True, exist_ok=True)
        recover(directory)
        temporary = temporary_folder(directory, _TEMPORARY)
        try:
            files: dict[str, dict[str, Any]] = {}
            for part, name in _PARTS.items():
                if part in state:
                    content = _serialize(part, state[part])
                    written += len(content)
                    # Of the bytes that were meant, not of those that the disk gives back.
                    files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                    write_synced(temporary / name, content)
            rest = {name: value for name, value in state.items() if name not in _PARTS}
            manifest: dict[str, Any] = {"format": FORMAT, "step": step, "files": files, "state": rest}
            manifest["sha256"] = _manifest_sha256(manifest)
            write_synced(temporary / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
            sync(temporary)
            return _put_in_place(temporary, directory, step)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        needed = max(written, sum(t.nbytes for t in tensors(state)))
        existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        raise NotSaved(
            error.errno,
            f"the checkpoint of step {step:,} could not be written to {directory}: {error.strerror or error} "
            f"({free:,} bytes are free, about {needed:,} are needed)",
        ) from error


def _put_in_place(temporary: Path, directory: Path, step: int) -> Path:
    """Give the finished folder its name, and return it."""
    target, aside = directory / f"step-{step}", directory / f"step-{step}{_REPLACED}"
    replacing = target.exists()
    if replacing:  # the same step once more: under its second name the old one stays findable
        target.rename(aside)
    temporary.rename(target)
    sync(directory)
    if replacing:
        shutil.rmtree(aside)
    return target


def recover(directory: Path | str) -> None:
    """Mend what a crash or a power cut has left in `directory`; to be called by the process that saves there.

    Removes half-written and half-deleted checkpoints. A crash between the two renames of a replacement leaves the old
    checkpoint under its second name; it gets its own back.
    """
    directory = Path(directory)
    for aside in directory.glob(f"step-*{_REPLACED}"):
        target = aside.with_name(aside.name.removesuffix(_REPLACED))
        if target.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(target)
    for prefix in (_TEMPORARY, _DELETED):
        for path in directory.glob(f"{prefix}*"):
            shutil.rmtree(path)


def load(path: Path | str) -> Checkpoint:
    """Read one checkpoint folder. Raises UserError if it is missing or does not verify."""
    try:
        return _read(Path(path))
    except Damaged as error:
        raise UserError(f"{path} cannot be used: {error}.") from error


def load_latest(directory: Path | str) -> Checkpoint | None:
    """Read the newest checkpoint in `directory` that verifies; None if there is none.

    `skipped` of the result names the newer ones that were passed over. Raises UserError if there are checkpoints, but
    none verifies, and OSError if `directory` cannot be read.
    """
    skipped = []
    if Path(directory).is_dir():
        os.listdir(directory)  # raises where it may not be read, about which glob is silent
    for path in reversed(list_checkpoints(directory)):
        try:
            return replace(_read(path), skipped=skipped)
        except Damaged as error:
            skipped.append((path, str(error)))
    if skipped:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
        raise UserError(f"no checkpoint in {directory} can be used ({reasons}).")
    return None


def list_checkpoints(directory: Path | str) -> list[Path]:
    """The checkpoint folders in `directory`, oldest first, unverified.

    It changes nothing, so that another process may look while a run saves. A checkpoint that is just being replaced
    is listed under its second name.
    """
    found: dict[int, Path] = {}
    for path in Path(directory).glob("step-*"):
        match = re.fullmatch(rf"step-(\d+)({re.escape(_REPLACED)})?", path.name)
        if match and (match[2] is None or int(match[1]) not in found):
            found[int(match[1])] = path
    return [path for _, path in sorted(found.items())]


def prune(directory: Path | str, step: int, *, keep_last: int, keep_steps: set[int]) -> None:
    """Delete what is not wanted after a save of `step`, and what crashed saves left.

    Up to `step`, the newest `keep_last` checkpoints and the steps in `keep_steps` stay; later ones, which a resumed
    run passed over as damaged or has left behind, go.
    """
    directory = Path(directory)
    recover(directory)
    steps = [int(path.name.removeprefix("step-")) for path in list_checkpoints(directory)]
    wanted = {*[s for s in steps if s <= step][-keep_last:], *keep_steps}
    for unwanted in set(steps) - wanted:  # renamed first, so that a crash leaves no half of one under its name
        (directory / f"step-{unwanted}").rename(directory / f"{_DELETED}{unwanted}")
    recover(directory)


def _serialize(part: str, value: Any) -> bytes:
    """The content of a part's file, made in memory: torch.save and safetensors hide what a full disk says."""
    if part == "optimizer":
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()
    if wrapped := [key for key in value if key.startswith(("_orig_mod.", "module."))]:
        raise ValueError(f"{part} has the key {wrapped[0]!r}; save the unwrapped network's state dict")
    # safetensors stores dense row-major tensors; loading copies into whatever memory format the network has.
    return safetensors.torch.save({key: t.detach().cpu().contiguous() for key, t in value.items()})


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors(each)


def _read(path: Path) -> Checkpoint:
    """A verified checkpoint. A run that goes on may replace it between two files, so a second reading decides."""
    try:
        return _read_once(path)
    except Damaged:
        return _read_once(path)


def _read_once(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        expected_sha256 = manifest.pop("sha256")
        version, step, files, state = (manifest[key] for key in ("format", "step", "files", "state"))
        if not (isinstance(step, int) and isinstance(files, dict) and isinstance(state, dict)):
            raise TypeError
    except OSError as error:
        raise _absent_or_unreadable(path / "manifest.json", error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"manifest.json is missing or unreadable ({type(error).__name__})") from error
    other = "" if version == FORMAT else f"its format is {version}, this version reads {FORMAT}; "
    if _manifest_sha256(manifest) != expected_sha256:
        raise Damaged(f"{other}manifest.json does not match its own SHA-256")
    if other:  # not damaged: passing over it would throw good training away
        raise UserError(f"{path}: {other}use the version of fastdiff that wrote it")
    part_of = {name: part for part, name in _PARTS.items()}
    for name, expected in files.items():
        if name not in part_of or not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise Damaged(f"manifest.json names {name!r}, which is no file of a checkpoint, or lacks its SHA-256")
        state[part_of[name]] = _read_part(path / name, expected)
    return Checkpoint(step, state, path)


def _read_part(file: Path, expected: dict[str, Any]) -> Any:
    name = file.name
    try:
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise Damaged(f"{name} has {counted(size, 'byte')} instead of {expected['bytes']}")
        content = file.read_bytes()
    except OSError as error:
        raise _absent_or_unreadable(file, error) from error
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise Damaged(f"{name} does not match its SHA-256")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError) as error:
        if "memory" in str(error):  # torch's own, as RuntimeError
            raise
        # Its checksum is right, so it was made so: by another program, or to do harm.
        raise Damaged(f"{name} holds other things than tensors ({type(error).__name__})") from error


def _absent_or_unreadable(file: Path, error: OSError) -> Exception:
    """Whether a file is not there, which another checkpoint may make good, or only cannot be read now: passing over it
    would throw good training away."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return Damaged(f"{file.name} is missing")
    return UserError(f"{file} cannot be read ({error.strerror}); make it readable and try again.")


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

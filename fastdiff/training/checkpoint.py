"""Checkpoints: folders `step-N/` that are either whole and verified, or not there.

    step-N/model.safetensors      weights
    step-N/ema.safetensors        averaged weights
    step-N/optimizer.pt           optimizer state (torch.save; read with weights_only=True)
    step-N/manifest.json          step, sizes, SHA-256 of each file and of itself, and all else that is plain JSON

All files are written to a temporary folder and synced, the manifest last; then the folder is renamed. One flipped bit
loads silently with torch.load and with safetensors, so every file is checked against its SHA-256 before it is read.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.errors import UserError

FORMAT = 1
_TENSOR_PARTS = ("model", "ema")
_TEMPORARY = ".saving-"
_REPLACED = ".replaced"
_KEYS = ("format", "step", "files", "state", "sha256")


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


def save(directory: Path | str, step: int, state: Mapping[str, Any]) -> Path:
    """Write `directory/step-N`, replacing one of the same step.

    Args:
        directory: made if missing.
        step: updates made so far.
        state: `model` and `ema`, mappings of tensors, whose keys must not carry a wrapper's prefix; `optimizer`, a
            state dict; anything else must be plain JSON and goes into the manifest.

    Returns:
        The checkpoint's folder.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"step-{step}"
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=directory))
    try:
        names = [
            _write_part(temporary, name, value)
            for name, value in state.items()
            if name in (*_TENSOR_PARTS, "optimizer")
        ]
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "files": {
                name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
                for name in names
            },
            "state": {name: value for name, value in state.items() if name not in (*_TENSOR_PARTS, "optimizer")},
        }
        manifest["sha256"] = _manifest_sha256(manifest)
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for name in (*names, "manifest.json"):
            _sync(temporary / name)
        _sync(temporary)
        os.chmod(temporary, 0o755)
        if target.exists():  # the same step once more: under its second name the old one stays findable
            aside = directory / f"step-{step}{_REPLACED}"
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
            temporary.rename(target)
            shutil.rmtree(aside)
        else:
            temporary.rename(target)
        _sync(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def load(path: Path | str) -> Checkpoint:
    """Read one checkpoint folder. Raises UserError if it is missing or does not verify."""
    path = Path(path)
    try:
        return _read(path)
    except Damaged as error:
        raise UserError(f"{path} cannot be used: {error}.") from error


def load_latest(directory: Path | str) -> Checkpoint | None:
    """Read the newest checkpoint in `directory` that verifies; None if there is none.

    `skipped` of the result names the newer ones that were passed over. Raises UserError if there are checkpoints, but
    none verifies.
    """
    skipped = []
    for path in reversed(list_checkpoints(directory)):
        try:
            found = _read(path)
            return Checkpoint(found.step, found.state, found.path, skipped)
        except Damaged as error:
            skipped.append((path, str(error)))
    if skipped:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
        raise UserError(f"no checkpoint in {directory} can be used ({reasons}).")
    return None


def list_checkpoints(directory: Path | str) -> list[Path]:
    """The checkpoint folders in `directory`, oldest first, unverified.

    A crash between the two renames of a replacement leaves the old checkpoint under its second name; it gets its own
    back.
    """
    for aside in Path(directory).glob(f"step-*{_REPLACED}"):
        target = aside.with_name(aside.name.removesuffix(_REPLACED))
        if target.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(target)
    found = [
        (int(m[1]), path) for path in Path(directory).glob("step-*") if (m := re.fullmatch(r"step-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def prune(directory: Path | str, step: int, *, keep_last: int, keep_steps: set[int]) -> None:
    """Delete what is not wanted after a save of `step`, and what crashed saves left.

    Of the checkpoints up to `step`, the newest `keep_last` and those of `keep_steps` stay; later ones, which a resumed
    run passed over as damaged or has left behind, go.
    """
    steps = [int(path.name.removeprefix("step-")) for path in list_checkpoints(directory)]
    wanted = {*[s for s in steps if s <= step][-keep_last:], *keep_steps}
    for unwanted in set(steps) - wanted:
        shutil.rmtree(Path(directory) / f"step-{unwanted}")
    for path in Path(directory).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def _write_part(folder: Path, name: str, value: Any) -> str:
    if name == "optimizer":
        torch.save(value, folder / "optimizer.pt")
        return "optimizer.pt"
    wrapped = [key for key in value if key.startswith(("_orig_mod.", "module."))]
    if wrapped:
        raise ValueError(f"{name} has the key {wrapped[0]!r}; save the unwrapped network's state dict")
    # safetensors stores dense row-major tensors; loading copies into whatever memory format the network has.
    save_file({key: t.detach().cpu().contiguous() for key, t in value.items()}, folder / f"{name}.safetensors")
    return f"{name}.safetensors"


def _read(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version, step, files, state, expected_sha256 = (
            manifest.pop(key) if key == "sha256" else manifest[key] for key in _KEYS
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"manifest.json is missing or unreadable ({type(error).__name__})") from error
    if version != FORMAT:
        raise Damaged(f"its format is {version}, this version reads {FORMAT}")
    if _manifest_sha256(manifest) != expected_sha256:
        raise Damaged("manifest.json does not match its own SHA-256")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise Damaged(f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}")
        if _sha256(file) != expected["sha256"]:
            raise Damaged(f"{name} does not match its SHA-256")
    parts: dict[str, Any] = dict(state)
    for name in files:
        if name == "optimizer.pt":
            parts["optimizer"] = torch.load(path / name, map_location="cpu", weights_only=True)
        else:
            tensors: dict[str, Tensor] = load_file(path / name)
            parts[name.removesuffix(".safetensors")] = tensors
    return Checkpoint(step, parts, path)


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

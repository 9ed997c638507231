"""Keeps torch.compile's caches on disk apart for each version of the operators here."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch


def source_hash(root: Path, sources: Iterable[str]) -> str:
    """SHA-256, as 64 hex digits, of files, and of the Python files in folders, by names and contents.

    Args:
        root: the folder that the names start from.
        sources: files and folders below it.
    """
    digest = hashlib.sha256()
    for source in sources:
        path = root / source
        for file in [path] if path.is_file() else sorted(path.glob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def tag_caches() -> None:
    """Add this folder's hash to `torch.compiler.config.cache_key_tag`.

    A cache's key holds an operator's name and arguments, but not the Python behind it, its gradient's formula or its
    tiles: what was compiled before one of them changed would go on being used, forward and backward.
    """
    config = torch.compiler.config
    tag = f"fastdiff-kernels-{source_hash(Path(__file__).parent, ['.'])}"
    config.cache_key_tag = f"{config.cache_key_tag} {tag}".strip()

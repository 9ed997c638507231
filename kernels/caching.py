"""Keeps torch.compile's caches on disk apart for each version of the operators here."""

import hashlib
from pathlib import Path

import torch


def source_hash(folder: Path) -> str:
    """16 hex digits of the Python files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def tag_caches() -> None:
    """Add this folder's hash to `torch.compiler.config.cache_key_tag`.

    A cache's key holds an operator's name and arguments, but not the Python behind it, its gradient's formula or its
    tiles: what was compiled before one of them changed would go on being used, forward and backward.
    """
    tag = f"fastdiff-kernels-{source_hash(Path(__file__).parent)}"
    config = torch.compiler.config
    if tag not in config.cache_key_tag:
        config.cache_key_tag = f"{config.cache_key_tag} {tag}".strip()

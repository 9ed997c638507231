"""Checkpoints beside the training: a snapshot is taken at once, then a thread hashes and writes it."""

import copy
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.runs import checkpoint

log = logging.getLogger(__name__)


class BackgroundSaver:
    """Saves into one directory, one checkpoint at a time.

    Training is held up for the snapshot alone, a copy into host memory (571 MB for 35.7 M parameters), unless the save
    before is still under way. What `checkpoint` promises of a crash holds: a checkpoint is whole, or is not there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None

    def save(self, step: int, state: Mapping[str, Any], *, keep_last: int, keep_steps: set[int]) -> None:
        """Take a snapshot, which a thread saves before it prunes; the save before must have been collected."""
        assert self._saving is None
        self._saving = self._pool.submit(self._write, step, snapshot(state), keep_last, keep_steps)

    def _write(self, step: int, state: dict[str, Any], keep_last: int, keep_steps: set[int]) -> None:
        checkpoint.save(self.directory, step, state)
        try:
            checkpoint.prune(self.directory, step, keep_last=keep_last, keep_steps=keep_steps)
        except OSError as error:  # the next save tries again
            log.warning("%s: older checkpoints cannot be removed (%s)", self.directory, error.strerror)

    def collect(self, *, wait: bool) -> bool:
        """Whether no save is under way, with `wait` after it has ended; raises what the last one raised, once."""
        if self._saving is None:
            return True
        if not wait and not self._saving.done():
            return False
        saving, self._saving = self._saving, None
        saving.result()
        return True

    def wait(self) -> None:
        """Until no save is under way; how it has ended is for `collect` to say."""
        if self._saving is not None:
            self._saving.exception()  # returned, not raised

    def close(self) -> None:
        """Wait, and end the thread."""
        self._pool.shutdown()


def snapshot(value: Any) -> Any:
    """A deep copy of nested mappings, lists and tuples, with all tensors in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.preserve_format)
    if isinstance(value, Mapping):
        return {key: snapshot(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(each) for each in value)
    return copy.deepcopy(value)

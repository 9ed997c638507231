"""Output must never stop what it only tells about: what cannot be written to stdout or stderr is dropped.

A reader may go away (`| head`, a killed `tee`: EPIPE), a terminal may close (EIO), the disk with the log may be full
(ENOSPC), and the locale may lack a character. print, rich, logging, warnings and Python's own flush at exit then go on
as if all had been written.
"""

import io
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

from fastdiff.errors import UserError

_failures: dict[str, str] = {}  # stream -> why the first write to it failed
_listeners: list[Callable[[str], object]] = []


def spare() -> None:
    """From now on, no write to this process's own stdout and stderr fails."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: a file opened next would take its number, and receive messages
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # not a replacement, such as a test's
            raw = _Dropping(descriptor, "wb", closefd=False)
            raw.name = name
            encoding = getattr(stream, "encoding", "utf-8")
            text = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, text)


class _Dropping(io.FileIO):
    """A descriptor to which every write succeeds."""

    def write(self, data) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            written = None
            _failed(str(self.name), error.strerror or type(error).__name__)
        return len(data) if written is None else written  # None: it failed, or would block


def _failed(stream: str, reason: str) -> None:
    if stream not in _failures:
        _failures[stream] = reason
        for listener in _listeners:
            listener(_told(stream))


def _told(stream: str) -> str:
    return f"{stream} cannot be written to ({_failures[stream]}); what it should show is lost, all else goes on"


@contextmanager
def losses_told_to(listener: Callable[[str], object]) -> Generator[None]:
    """Within it, the first failed write to each stream is told in one line, also one that has failed before."""
    for stream in list(_failures):
        listener(_told(stream))
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def put(result: str) -> None:
    """Print the result for which a command was called.

    Raises:
        UserError: stdout cannot be written to; the message has the result.
    """
    _failures.pop("stdout", None)
    print(result, flush=True)
    if "stdout" in _failures:
        raise UserError(f"stdout cannot be written to ({_failures['stdout']}); the result is {result}")


def write(descriptor: int, text: str) -> None:
    """Write without Python's streams, on which another thread may hang."""
    with suppress(OSError):
        os.write(descriptor, text.encode())

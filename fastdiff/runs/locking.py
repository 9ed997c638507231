"""The lock of a run directory, so that one process at a time writes there."""

import fcntl
import os
import re
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from fastdiff.errors import UserError

HOLDER_SECONDS = 1.0  # for how long a refused process waits for the holder's name


def acquire(run: Path) -> int:
    """Take the lock of the directory `run`; returns its descriptor. The kernel frees it when the process ends, by
    kill -9 too. Raises UserError, naming the holder, where another process has it."""
    try:
        descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"{run / 'lock'}: cannot be opened for writing ({error.strerror}); check permissions"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise UserError(f"{run}: in use by another process ({holder}); wait, stop it, or start a new run") from error
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"{run}: cannot be locked ({error.strerror}); put runs on a file system with flock") from error
    started = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()}, host {socket.gethostname()}, since {started}\n".encode(), 0)
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"{run / 'lock'}: cannot be written ({error.strerror}); free some space") from error
    return descriptor


def release(descriptor: int) -> None:
    """Give the lock back."""
    os.ftruncate(descriptor, 0)
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # explicitly: a forked child may hold a copy of the descriptor
    os.close(descriptor)


def _holder(descriptor: int) -> str:
    """Who holds a lock: what it wrote there. It writes just after it took the lock, hence the wait."""
    deadline = time.monotonic() + HOLDER_SECONDS
    while True:
        text = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        match = re.match(r"pid (\d+), host (\S+),", text)
        # A dead process on this host is an earlier holder, which was killed.
        if match and (match[2] != socket.gethostname() or _alive(int(match[1]))):
            return text
        if time.monotonic() > deadline:
            return "just starting or stopping"
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True

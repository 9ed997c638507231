"""Stopping on request: the first signal asks, the second leaves at once."""

import os
import signal
import threading
import time
from types import FrameType

from fastdiff.runtime import output


class Stopped(Exception):
    """A signal asked the run to stop; raised where work can be broken off without loss."""


class StopRequest:
    """Within `with StopRequest() as stop`, SIGINT, SIGTERM and SIGHUP set `stop.signal` instead of ending the process.

    SIGHUP (the terminal has closed) stays ignored where nohup has had it ignored.

    A second SIGINT or SIGTERM ends the process at once, with the exit code 128 + its number. SIGHUP counts for neither:
    shell and kernel each send one, often with a SIGTERM. Python runs handlers between two bytecodes of the main thread,
    so not before a long call into C is over (a step, an fsync of a checkpoint). The number of each signal is therefore
    also written to a pipe (`signal.set_wakeup_fd`), which a thread reads; only a call into C that keeps the
    interpreter's lock, as no long one of PyTorch's does, delays that too. The previous handlers come back afterwards.

    Args:
        quiet: say nothing when a signal comes.
        grace: seconds after the first signal in which more of them count as the same one.
    """

    def __init__(self, *, quiet: bool = False, grace: float = 0.0) -> None:
        self.quiet, self.grace = quiet, grace
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._signals = [signal.SIGINT, signal.SIGTERM] + ([] if nohup else [signal.SIGHUP])
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        self._previous = {s: signal.signal(s, self._handle) for s in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._writer)  # the thread reads the end of the file
        self._thread.join()
        os.close(self._reader)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)

    def _watch(self) -> None:
        asked: float | None = None
        while number := os.read(self._reader, 1):
            if number[0] not in self._signals:
                continue  # another signal that has a Python handler
            self._handle(number[0], None)
            if number[0] == signal.SIGHUP:
                continue
            if asked is not None and time.monotonic() - asked < self.grace:
                continue
            if asked is not None:
                if os.isatty(1):
                    output.write(1, "\x1b[?25h\n")  # the live line hid the cursor
                os._exit(128 + number[0])
            asked = time.monotonic()
            if not self.quiet:
                output.write(2, "\nfinishing this step, then saving; once more to leave at once\n")

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.signal is not None:
            raise Stopped

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 without one."""
        return 128 + self.signal if self.signal is not None else 0

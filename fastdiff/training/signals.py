"""Stopping on request: the first signal asks, the second leaves at once."""

import os
import signal
from types import FrameType


class Stopped(Exception):
    """A signal asked the run to stop; raised where work can be broken off without loss."""


class StopRequest:
    """Within `with StopRequest() as stop`, SIGINT and SIGTERM set `stop.signal` instead of ending the process.

    A second signal ends it at once, with the exit code 128 + its number. The previous handlers come back afterwards.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # os.write, as a handler may interrupt a print.
        if self.signal is not None:
            if os.isatty(1):
                os.write(1, b"\x1b[?25h\n")  # the live line hid the cursor
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        os.write(2, b"\nfinishing this step, then saving; once more to leave at once\n")

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.signal is not None:
            raise Stopped

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 without one."""
        return 128 + self.signal if self.signal is not None else 0

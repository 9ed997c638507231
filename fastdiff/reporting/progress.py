"""The training's live line, a progress bar for slow loops, and the console that both share.

On a terminal the lines are redrawn in place; elsewhere (a file, a pipe, CI) they are plain text that is only appended.
"""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30  # of `track`, where there is no terminal


@functools.cache
def _consoles() -> tuple[Console, Console]:
    """On stdout and on stderr, for a run's output; they print text as it is, without markup or emoji codes."""
    out, err = (Console(highlight=False, markup=False, emoji=False, stderr=stderr) for stderr in (False, True))
    for each in (out, err):
        each.soft_wrap = not each.is_terminal  # in a file a line stays one line, however long
    return out, err


class TrainingProgress:
    """Shows where the training is: a live line on a terminal, otherwise one plain line per update.

        step 500/2000  images 64,000  loss 0.0312  3,210 img/s  eval in 0:12  end in 1:03

    Args:
        total_steps: the step at which the run ends; None for a run that goes on until it is stopped.
        console: where to show it; by default the shared one on stdout.
    """

    def __init__(self, total_steps: int | None, console: Console | None = None):
        self.total_steps = total_steps
        self._console = console if console is not None else _consoles()[0]
        self._shown: tuple[int, int, float, float, int | None] | None = None  # the arguments of `update`
        self._updated = 0.0
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # It redraws by itself, so that a bar of `track` nested in it moves, and the times count down.
            self._live = Live(console=self._console, get_renderable=self._frame, refresh_per_second=4)

    def __enter__(self) -> TrainingProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.stop()

    def update(
        self, *, step: int, images: int, loss: float, images_per_second: float, steps_to_eval: int | None = None
    ) -> None:
        """Shows the numbers of a log step; `images` counts those seen since step 0.

        The times to the next evaluation and to the end are for training alone, at the speed given.
        """
        self._shown = step, images, loss, images_per_second, steps_to_eval
        self._updated = time.monotonic()
        if self._live is not None:
            self._live.refresh()
        else:
            self._console.print(Text("  ".join(self._fields())), soft_wrap=True)

    def print(self, text: str) -> None:
        """Prints a line that stays, above the live line."""
        self._console.print(Text(text), soft_wrap=self._live is None)

    def _fields(self, elapsed: float = 0.0) -> list[str]:
        """The parts of the line, as it stands `elapsed` seconds after the last update."""
        if self._shown is None:
            return ["starting"]
        step, images, loss, speed, steps_to_eval = self._shown
        fields = [
            f"step {step}" if self.total_steps is None else f"step {step}/{self.total_steps}",
            f"images {images:,}",
            f"loss {loss:.4f}" if 1e-3 <= abs(loss) < 1e3 else f"loss {loss:.3g}",
            f"{speed:,.0f} img/s" if speed >= 10 else f"{speed:.2g} img/s",
        ]
        if step > 0 and 0 < speed < math.inf:
            seconds_per_step = images / step / speed
            if steps_to_eval is not None:
                fields.append(f"eval in {format_seconds(steps_to_eval * seconds_per_step - elapsed)}")
            if self.total_steps is not None:
                fields.append(f"end in {format_seconds((self.total_steps - step) * seconds_per_step - elapsed)}")
        return fields

    def _frame(self) -> Group | Table:
        fields = self._fields(time.monotonic() - self._updated)
        lines = [""]
        for field in fields:  # a narrow terminal gets several lines, broken between fields
            joined = f"{lines[-1]}  {field}" if lines[-1] else field
            if len(joined) <= self._console.width or not lines[-1]:
                lines[-1] = joined
            else:
                lines.append(field)
        room = self._console.width - len(lines[0]) - 2
        if self.total_steps is None or self._shown is None or len(lines) > 1 or room < 10:
            return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))
        row = Table.grid(padding=(0, 2, 0, 0))
        done = ProgressBar(total=self.total_steps, completed=self._shown[0], width=min(room, 30))
        row.add_row(done, Text(lines[0]))
        return row


@contextmanager
def bar(description: str, total: int | None = None) -> Generator[Callable[[float], None]]:
    """Shows the progress of slow work. Yields show(units done so far), for the caller to call.

    On a terminal it is a bar that vanishes at the end; otherwise a line on stderr every 30 seconds, so that stdout
    stays clean for results.
    """
    stdout, stderr = _consoles()
    # The live line's own console where that is a terminal, so that the two are drawn together.
    screen = stdout if stdout.is_terminal else stderr
    if screen.is_terminal and not screen.is_dumb_terminal:
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=screen, transient=True) as progress:
            task = progress.add_task(description, total=total)
            yield lambda done: progress.update(task, completed=done)
        return
    start = last = time.monotonic()

    def show(done: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        line = f"{description}  {int(done):,}" + ("" if total is None else f"/{total:,}")
        line += f"  {format_seconds(now - start)} so far"
        if total is not None and done > 0:
            line += f"  {format_seconds((now - start) / done * (total - done))} to go"
        screen.print(Text(line), soft_wrap=True)

    yield show


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields from `iterable` while a `bar` shows how far it is. `total` is needed only where it has no length."""
    if total is None:
        total = operator.length_hint(iterable) or None
    with bar(description, total) as show:
        for done, item in enumerate(iterable):
            show(done)
            yield item
            show(done + 1)


def format_seconds(seconds: float) -> str:
    """A duration for people: 0:07, 12:34, 1:02:03, 3d 4h; negative ones are 0:00."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

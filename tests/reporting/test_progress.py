import contextlib
import io
import math
import re

import pytest
from rich.console import Console

from fastdiff.reporting import progress
from fastdiff.reporting.progress import TrainingProgress, format_seconds, track


def plain(width=20):
    """A console that is no terminal, and narrow: lines must not be broken."""
    return Console(file=io.StringIO(), force_terminal=False, width=width)


def terminal(width=120):
    return Console(file=io.StringIO(), force_terminal=True, width=width, _environ={"TERM": "xterm"})


def text(screen):
    return screen.file.getvalue()


def last_frame(screen):
    """What stands on the terminal after the last redraw, without colours."""
    frame = text(screen).split("\x1b[2K")[-1]
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame).strip()


NUMBERS = {"step": 500, "images": 64_000, "loss": 0.03117, "images_per_second": 3210.4}


class TestPlainLines:
    def test_bounded(self):
        screen = plain()
        with TrainingProgress(2000, screen) as p:
            p.update(**NUMBERS, steps_to_eval=300)
            p.print("saved [step-500] :smile:")
            p.update(**NUMBERS | {"step": 2000, "images": 256_000, "loss": 1.0}, steps_to_eval=0)
        assert text(screen) == (
            "step 500/2000  images 64,000  loss 0.0312  3,210 img/s  eval in 0:12  end in 1:00\n"
            "saved [step-500] :smile:\n"
            "step 2000/2000  images 256,000  loss 1.0000  3,210 img/s  eval in 0:00  end in 0:00\n"
        )

    def test_open_ended(self):
        screen = plain()
        with TrainingProgress(None, screen) as p:
            p.update(**NUMBERS, steps_to_eval=9500)
            p.update(**NUMBERS)
        assert text(screen) == (
            "step 500  images 64,000  loss 0.0312  3,210 img/s  eval in 6:19\n"
            "step 500  images 64,000  loss 0.0312  3,210 img/s\n"
        )

    @pytest.mark.parametrize("speed", [0.0, math.nan, math.inf])
    def test_no_speed_no_times(self, speed):
        screen = plain()
        with TrainingProgress(2000, screen) as p:
            p.update(**NUMBERS | {"images_per_second": speed}, steps_to_eval=3)
        assert " in " not in text(screen)
        assert text(screen).startswith("step 500/2000  images 64,000  loss 0.0312  ")

    @pytest.mark.parametrize(
        ("loss", "shown"), [(0.00042, "0.00042"), (3.21e-5, "3.21e-05"), (12345.6, "1.23e+04"), (math.nan, "nan")]
    )
    def test_loss_and_slow_speed(self, loss, shown):
        screen = plain()
        with TrainingProgress(None, screen) as p:
            p.update(**NUMBERS | {"loss": loss, "images_per_second": 4.27})
        assert text(screen) == f"step 500  images 64,000  loss {shown}  4.3 img/s\n"


class TestLiveLine:
    def test_bar_and_numbers(self):
        screen = terminal()
        with TrainingProgress(2000, screen) as p:
            p.print("line [above]")
            p.update(**NUMBERS, steps_to_eval=300)
        assert "starting" in text(screen)
        assert "line [above]\n" in text(screen)
        assert re.fullmatch(
            r"━+[╸╺]?━+  step 500/2000  images 64,000  loss 0\.0312  3,210 img/s  eval in 0:1[12]  end in (0:59|1:00)",
            last_frame(screen),
        )
        assert text(screen).endswith("\x1b[?25h")  # the cursor is back

    def test_open_ended_has_no_bar(self):
        screen = terminal()
        with TrainingProgress(None, screen) as p:
            p.update(**NUMBERS)
        assert last_frame(screen) == "step 500  images 64,000  loss 0.0312  3,210 img/s"

    def test_narrow_terminal_breaks_between_fields(self):
        screen = terminal(width=34)
        with TrainingProgress(2000, screen) as p:
            p.update(**NUMBERS, steps_to_eval=300)
        lines = [line.strip() for line in last_frame(screen).splitlines()]
        assert lines[:2] == ["step 500/2000  images 64,000", "loss 0.0312  3,210 img/s"]
        assert re.fullmatch(r"eval in 0:1[12]  end in (0:59|1:00)", lines[2])

    def test_times_count_down(self, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
        p = TrainingProgress(2000, plain())
        p.update(**NUMBERS, steps_to_eval=300)
        assert p._fields(elapsed=5.0)[-2:] == ["eval in 0:07", "end in 0:55"]
        assert p._fields(elapsed=50.0)[-2:] == ["eval in 0:00", "end in 0:10"]

    def test_an_exception_ends_it(self):
        screen = terminal()
        with contextlib.suppress(KeyboardInterrupt), TrainingProgress(2000, screen):
            raise KeyboardInterrupt
        assert text(screen).endswith("\x1b[?25h")

    def test_dumb_terminal_gets_plain_lines(self):
        screen = Console(file=io.StringIO(), force_terminal=True, width=120, _environ={"TERM": "dumb"})
        with TrainingProgress(2000, screen) as p:
            p.update(**NUMBERS)
        assert text(screen) == "step 500/2000  images 64,000  loss 0.0312  3,210 img/s  end in 1:00\n"


class TestTrack:
    @pytest.fixture
    def screens(self, monkeypatch):
        def use(stdout, stderr):
            monkeypatch.setattr(progress, "_consoles", lambda: (stdout, stderr))
            return stdout, stderr

        return use

    def test_quick_loops_are_silent_off_a_terminal(self, screens):
        stdout, stderr = screens(plain(), plain())
        assert list(track(range(100), "sampling")) == list(range(100))
        assert text(stdout) == text(stderr) == ""

    @pytest.mark.parametrize(("total", "of", "to_go"), [(None, "", ""), (8, "/8", "  {} to go")])
    def test_slow_loops_tell_on_stderr_every_30_s(self, screens, monkeypatch, total, of, to_go):
        stdout, stderr = screens(plain(), plain())
        now = [0.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
        for _ in track((i for i in range(8)), "sampling [a]", total):
            now[0] += 10
        assert text(stdout) == ""
        assert text(stderr) == (
            f"sampling [a]  3{of}  0:30 so far{to_go.format('0:50')}\n"
            f"sampling [a]  6{of}  1:00 so far{to_go.format('0:20')}\n"
        )

    def test_bar_on_a_terminal_vanishes(self, screens):
        stdout, stderr = screens(plain(), terminal())
        assert list(track((c for c in "abc"), "extracting [x]", 3)) == ["a", "b", "c"]
        assert text(stdout) == ""
        assert "extracting [x]" in text(stderr)
        assert "3/3" in text(stderr)
        assert last_frame(stderr) == ""

    def test_inside_the_live_line(self, screens):
        stdout, stderr = screens(terminal(), terminal())
        with TrainingProgress(2000) as p:
            p.update(**NUMBERS)
            for i in track(range(3), "sampling"):
                p.update(**NUMBERS)
                p.print(f"item {i}")
        assert "item 2\n" in text(stdout)
        assert "sampling" in text(stdout)
        assert "sampling" not in last_frame(stdout)
        assert text(stderr) == ""

    def test_leaving_early(self, screens):
        _, stderr = screens(plain(), terminal())
        for item in track(range(10), "sampling"):
            if item == 2:
                break
        assert text(stderr).count("\x1b[?25h") >= 1


def test_console_prints_text_as_it_is(capsys, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    progress._consoles.cache_clear()  # another test may have made them on a terminal
    line = "/a/[bold]/path :smile: 123 " + "x" * 200
    progress._consoles()[0].print(line)
    assert progress._consoles() is progress._consoles()
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-3, "0:00"),
        (7.4, "0:07"),
        (59.6, "1:00"),
        (754, "12:34"),
        (3723, "1:02:03"),
        (86399, "23:59:59"),
        (273600, "3d 4h"),
    ],
)
def test_format_seconds(seconds, shown):
    assert format_seconds(seconds) == shown

"""A promise is a test with a number: a few cases in CI, the full count with --slow, by the same code."""

import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastdiff.config import Config
from tests.reliability import table


class Promise:
    """Counts a promise's cases and those that broke it."""

    def __init__(self) -> None:
        self.count, self.failures = 0, []

    @contextmanager
    def case(self, name: object):
        """One case; a failed assertion in it breaks the promise, and the next case follows."""
        self.count += 1
        try:
            yield
        except (AssertionError, pytest.fail.Exception) as error:
            self.failures.append(f"{name}: {error}")


@pytest.fixture
def promise(request):
    """promise(text, unit) -> a context that counts cases; at its end they are recorded, with --slow, and judged."""

    @contextmanager
    def promise(text: str, unit: str):
        counted, began, broken = Promise(), time.monotonic(), 1
        try:
            yield counted
            broken = 0
        finally:
            row = {"count": counted.count, "unit": unit, "failures": len(counted.failures) + broken}
            if request.config.getoption("--slow"):  # the long count comes after the short one, and replaces it
                table.record(text, row | {"seconds": round(time.monotonic() - began, 1)})
        assert counted.count > 0
        assert not counted.failures, f"{len(counted.failures)} of {counted.count}:\n" + "\n".join(counted.failures)

    return promise


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--slow") and table.read():
        terminalreporter.section("reliability")
        terminalreporter.write_line(table.markdown(table.read()))


@pytest.fixture
def tiny_config(tiny_config):
    """As everywhere, with a row for every step."""

    def make(root: Path | str = "working", **changes) -> Config:
        return tiny_config(root, **{"log_every": 1, **changes})

    return make


SLOW = (pytest.mark.slow, pytest.mark.timeout(3600))


def counts(fast: int, slow: int):
    """Parametrizes a test by `count`: `fast` always, `slow` with --slow."""
    return pytest.mark.parametrize("count", [fast, pytest.param(slow, marks=SLOW)])

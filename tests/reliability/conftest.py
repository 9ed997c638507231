"""A promise is a test with a number: a few cases in CI, the full count with --slow, by the same code."""

import dataclasses
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fastdiff.config import Config
from tests.reliability import table
from tests.training.conftest import TINY


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
def tiny_config(tmp_path):
    """A run of 30 steps over 50 smooth images in batches of 8, so that an epoch ends within the 7th step."""
    coarse = np.random.default_rng(0).integers(0, 256, (50, 2, 2, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=coarse.repeat(4, 1).repeat(4, 2))

    def make(root: Path | str = "working", **changes) -> Config:
        config = Config(
            data=str(tmp_path / "images.npz"), data_root=str(tmp_path / "data"), net=TINY, timesteps=100, batch_size=8,
            lr=1e-3, warmup_steps=5, ema_decay=0.9, steps=30, device="cpu", log_every=1, save_every=10,
            eval_every=1000, keep_last=10, run_root=str(tmp_path / root), features="none", eval_batch_size=4,
            eval_steps=2, grid_samples=4,
        )  # fmt: skip
        return dataclasses.replace(config, **changes)

    return make


SLOW = (pytest.mark.slow, pytest.mark.timeout(3600))


def counts(fast: int, slow: int):
    """Parametrizes a test by `count`: `fast` always, `slow` with --slow."""
    return pytest.mark.parametrize("count", [fast, pytest.param(slow, marks=SLOW)])

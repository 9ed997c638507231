"""Host memory over a long run."""

import gc
import json
import subprocess
import sys
from itertools import combinations
from statistics import median

import numpy as np
import pytest
from matplotlib.figure import Figure

from fastdiff.presets import PRESETS
from fastdiff.training.train import train
from tests.reliability import jobs
from tests.reliability.conftest import counts

glibc = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux and glibc for the memory in use")

WINDOWS = 20  # of a run: in each an evaluation, a save, and a look at the memory
WARM = 5  # windows after which what is made once is there


def growth(seen: list[int]) -> float:
    """Bytes by which memory grows over a whole run: the median slope between any two windows, the first ones aside."""
    warm = seen[WARM:]
    return len(seen) * median((b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(warm), 2))


@glibc
@pytest.mark.timeout(3600)  # 2,000 steps take longer than other tests may
@counts(fast=100, slow=2000)
def test_it_stays(tiny_config, tmp_path, promise, count):
    """Both evaluate and save several times; the long run with the network of `quick`, distances and all plots."""
    window = count // WINDOWS
    changes = {"steps": count + 1, "eval_every": window, "save_every": window, "keep_last": 2, "log_every": 5}
    config = tiny_config(**changes)
    if count == 2000:
        config = PRESETS["quick"].replace(
            **changes, run_root=str(tmp_path / "working"), data_root=str(tmp_path / "data"),
            eval_samples=32, eval_batch_size=32, eval_steps=4, grid_samples=16, eval_at_start=False, device="cpu",
            lr_decay="constant",
        )  # fmt: skip
    log, result = tmp_path / "log", tmp_path / "memory.json"
    hook = (jobs.watch_memory, range(window // 2, count, window), result)
    given = (jobs.train_whole, config, hook) if count == 2000 else (jobs.train_run, config, None, hook)
    with promise("Memory: the host's grows by less than 20 MB after warm-up", f"steps of {config.preset}") as p:
        p.count = count - 1
        with p.case("memory"):
            process = jobs.start(*given, log=log)
            assert jobs.finish(process, 3600) == 0, log.read_text()[-3000:]
            seen = json.loads(result.read_text())
            assert len(seen) == WINDOWS
            assert growth(seen) < 20e6, f"in MB {[round(each / 1e6) for each in seen]}"


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_is_told_from_what_comes_and_goes(seed):
    swings = np.random.default_rng(seed).integers(0, 10_000_000, WINDOWS)
    once = np.where(np.arange(WINDOWS) < 2, 0, 300_000_000)
    assert abs(growth((once + swings).tolist())) < 20e6
    assert growth((once + swings + 2_000_000 * np.arange(WINDOWS)).tolist()) > 20e6


FREED = """
from tests.reliability import jobs
before = jobs.memory()
held = [bytes(50_000) for _ in range(2000)]  # too small for a mapping of their own
held_more = jobs.memory() - before
last = bytes(50_000)  # at the heap's end, so that it cannot shrink there
del held
print(held_more, jobs.memory() - before)
"""


@glibc
def test_memory_that_was_freed_is_not_in_use(repo):
    """In a new process, as one that has run tests may hold them in memory that it had."""
    done = subprocess.run([sys.executable, "-c", FREED], cwd=repo, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    held, freed = map(int, done.stdout.split())
    assert held > 90e6
    assert freed < 10e6


def test_figures_are_freed_when_they_are_written(tiny_config):
    gc.collect()
    gc.disable()
    try:
        assert train(tiny_config(steps=2, save_every=1, eval_every=2)) == 0
        assert not [each for each in gc.get_objects() if isinstance(each, Figure)]
    finally:
        gc.enable()

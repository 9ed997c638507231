"""Host memory over a long run."""

import dataclasses
import json

import pytest

from fastdiff.config import PRESETS
from tests.reliability import jobs
from tests.reliability.conftest import counts


@pytest.mark.timeout(3600)  # 2,000 steps take longer than other tests may
@counts(fast=100, slow=2000)
def test_it_stays(tiny_config, tmp_path, promise, count):
    """Both evaluate and save several times; the long run with the network of `quick`, distances and all plots."""
    changes = {
        "steps": count + 1,
        "eval_every": count // 10,
        "save_every": count // 10,
        "keep_last": 2,
        "log_every": 10,
    }
    config = tiny_config(**changes)
    if count == 2000:
        config = dataclasses.replace(
            PRESETS["quick"], **changes, run_root=str(tmp_path / "working"), data_root=str(tmp_path / "data"),
            eval_samples=32, eval_batch_size=32, eval_steps=4, grid_samples=16, eval_at_start=False, device="cpu",
        )  # fmt: skip
    log, result = tmp_path / "log", tmp_path / "memory.json"
    warm, end = count // 4 + 5, count
    hook = (jobs.watch_memory, (warm, end), result)
    given = (jobs.train_whole, config, hook) if count == 2000 else (jobs.train_run, config, None, hook)
    process = jobs.start(*given, log=log)
    assert jobs.finish(process, 3600) == 0, log.read_text()[-3000:]
    before, after = json.loads(result.read_text())
    with promise("Memory: the host's grows by less than 20 MB after warm-up", f"steps of {config.preset}") as p:
        p.count = count - 1
        with p.case(f"from {before / 2**20:.0f} to {after / 2**20:.0f} MiB"):
            assert after - before < 20e6

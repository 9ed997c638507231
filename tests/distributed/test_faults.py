"""A rank that is killed, raises, exits or hangs, anywhere: torchrun ends all and says why, and the next start goes on
from the last checkpoint."""

import json
import os
import time
from pathlib import Path

import pytest

from fastdiff.config import Config
from fastdiff.runs import checkpoint
from tests.configs import flags_of
from tests.distributed.conftest import torchrun

PROMISE = "Ranks: one is killed, raises, exits or hangs; all gone within 40 s (timeout + 40 s), named, resumable"
TIMEOUT = 6.0  # of a hang, seconds; any step must be quicker
# place -> the rank at fault (rank 0 saves), and which call of the place's function: in steps 6 to 10, or just after
PLACES = {"data": (1, 8), "forward": (0, 7), "all-reduce": (1, 30), "save": (0, 2), "evaluation": (1, 2)}
# way -> the root cause in torchrun's summary
WAYS = {
    "kill": "rank      : {rank} .*Signal 9 (SIGKILL)",
    "raise": "rank      : {rank} .*RuntimeError: an injected fault",
    "exit": "rank      : {rank} .*exitcode  : 7",
    "hang": "rank      : {other} .*error: rank {other}: no answer from rank {rank} in",
}
FAST = [("kill", "save"), ("hang", "all-reduce")]


def check(run_ranks, config: dict, run: Path, way: str, place: str, mark: Path) -> None:
    """One case."""
    rank, call = PLACES[place]
    fault = {"rank": rank, "place": place, "call": call, "way": way, "mark": str(mark)}
    process = torchrun("tests/distributed/faulty.py", json.dumps(fault), *flags_of(Config.from_dict(config)))
    out, err = process.communicate(timeout=200)
    seconds = time.monotonic() - float(mark.read_text())
    assert process.returncode == 1, out + err
    assert seconds < (TIMEOUT if way == "hang" else 0) + 40
    for pid in (int(Path(f"{mark}-{each}").read_text()) for each in (0, 1)):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    root_cause = err.partition("Root Cause")[2]
    at = 0
    for part in WAYS[way].format(rank=rank, other=1 - rank).split(".*"):
        at = root_cause.find(part, at)
        assert at >= 0, err
    assert checkpoint.load_latest(run / "checkpoints").step in (5, 10)
    ended = run_ranks("train", config, str(run))
    assert ended.codes == [0, 0], ended.outputs
    assert checkpoint.load_latest(run / "checkpoints").step == 15


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(FAST, marks=pytest.mark.timeout(600)),
        pytest.param(
            [(way, place) for way in WAYS for place in PLACES], marks=[pytest.mark.slow, pytest.mark.timeout(3000)]
        ),
    ],
    ids=["2", "20"],
)
def test_a_fault_in_one_rank_ends_all(tiny_config, run_ranks, tmp_path, promise, cases):
    with promise(PROMISE, "faults") as p:
        for way, place in cases:
            root = f"{way}-{place}"
            config = tiny_config(root, steps=15, rank_timeout=TIMEOUT)
            with p.case(f"{way} in {place}"):
                check(run_ranks, config, tmp_path / root / "1", way, place, tmp_path / f"{root}.txt")

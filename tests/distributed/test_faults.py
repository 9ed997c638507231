"""A rank that is killed, raises, exits or hangs, anywhere: all are gone in seconds, one line says why, and the next
start goes on from the last checkpoint."""

from pathlib import Path

import pytest

from fastdiff.runs import checkpoint

PROMISE = "Ranks: one is killed, raises, exits or hangs; all gone within 10 s (timeout + 5 s), named, resumable"
TIMEOUT = 6.0  # of a hang, seconds; any step must be quicker
# place -> the rank at fault (rank 0 saves), and which call of the place's function: in steps 6 to 10, or just after
PLACES = {"data": (1, 8), "forward": (0, 7), "all-reduce": (1, 30), "save": (0, 2), "evaluation": (1, 2)}
WAYS = ("kill", "raise", "exit", "hang")
FAST = [("kill", "save"), ("raise", "evaluation"), ("exit", "forward"), ("hang", "all-reduce")]


def check(run_ranks, config, run: Path, way: str, place: str, mark: Path) -> None:
    """One case."""
    rank, call = PLACES[place]
    ended = run_ranks(
        "train", config, None, {"rank": rank, "place": place, "call": call, "way": way, "mark": str(mark)}
    )
    assert ended.codes[rank] == {"kill": -9, "raise": 1, "exit": 7, "hang": 1}[way], ended.outputs
    assert ended.codes[1 - rank] == 1, ended.outputs
    assert ended.gone - float(mark.read_text()) < (TIMEOUT + 5 if way == "hang" else 10)
    assert len(ended.errors) == 1, ended.outputs
    line = ended.errors[0]
    cause = {"kill": "has died", "raise": "has failed in", "exit": "has died", "hang": "has hung for"}[way]
    assert f"rank {rank} " in line.partition(cause)[0], line
    assert cause in line, line
    assert way != "raise" or "RuntimeError: an injected fault" in line, line
    assert way != "hang" or "faulty.py" in line, line
    assert checkpoint.load_latest(run / "checkpoints").step in (5, 10)
    ended = run_ranks("train", config, str(run))
    assert ended.codes == [0, 0], ended.outputs
    assert checkpoint.load_latest(run / "checkpoints").step == 15


@pytest.mark.parametrize(
    "cases",
    [
        FAST,
        pytest.param(
            [(way, place) for way in WAYS for place in PLACES], marks=[pytest.mark.slow, pytest.mark.timeout(1800)]
        ),
    ],
    ids=["4", "20"],
)
def test_a_fault_in_one_rank_ends_all(tiny_config, run_ranks, tmp_path, promise, cases):
    with promise(PROMISE, "faults") as p:
        for way, place in cases:
            root = f"{way}-{place}"
            config = tiny_config(root, steps=15, rank_timeout=TIMEOUT)
            with p.case(f"{way} in {place}"):
                check(run_ranks, config, tmp_path / root / "1", way, place, tmp_path / f"{root}.txt")

"""Ranks that train nothing: collectives, and what happens when one of them dies, fails or hangs."""

import pytest


def test_collectives(run_ranks):
    ended = run_ranks("collectives")
    assert ended.codes == [0, 0], ended.outputs


def test_a_signal_to_one_rank_is_one_to_all(run_ranks):
    ended = run_ranks("signal_to_one")
    assert ended.codes == [0, 0], ended.outputs


def test_a_slow_start_and_a_wait_for_a_rank_that_works_are_no_hangs(run_ranks):
    ended = run_ranks("slow_start")
    assert ended.codes == [0, 0], ended.outputs


def test_a_mistake_that_all_ranks_find_is_told_once(run_ranks):
    ended = run_ranks("same_mistake")
    assert ended.codes == [1, 1], ended.outputs
    assert "".join(ended.outputs) == "error: --flag is wrong\n"


def test_ranks_with_different_data_are_refused(run_ranks):
    ended = run_ranks("other_data")
    assert ended.codes == [1, 1], ended.outputs
    assert ended.errors == ["error: rank 1 has another data (set 1) than rank 0 (set 0); make them equal."]


@pytest.mark.parametrize(
    ("function", "codes", "cause"),
    [
        ("kill_0", [-9, 1], "rank 0 has died, last seen in "),
        ("stop_0", [-9, 1], "rank 0 has hung in "),
        ("stop_1", [1, -9], "rank 1 has hung for "),
        ("nobody_comes", [1, 1], "s in all-reduce of step 7 (world.py"),
    ],
)
def test_all_ranks_end_and_the_cause_is_named(run_ranks, function, codes, cause):
    ended = run_ranks(function)
    assert ended.codes == codes, ended.outputs
    assert ended.gone - ended.began < 3 + 5  # timeout + 5 s
    (line,) = ended.errors
    assert cause in line

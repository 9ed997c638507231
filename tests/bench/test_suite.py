"""The benchmark suite itself: its clock, its counts, every benchmark's code, and that it notices a slowdown."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import compare, test_kernels, test_peers
from bench.bars import BARS
from bench.parts import constant_batch, train_step, training_work
from bench.results import Results
from bench.suite import Against, Bench, Comparison, make_size, network_flops
from bench.timing import Stopwatch, Workload, interleave, rotations
from fastdiff.model_sections import UNetConfig
from kernels import REGISTRY

CPU = torch.device("cpu")


def test_the_stopwatch_measures_a_call():
    seconds = Stopwatch(CPU)(lambda i: time.sleep(0.02), 3, queued=False)
    assert 0.02 <= seconds < 0.2


def test_rounds_are_interleaved_and_each_call_has_its_own_index():
    calls = []
    work = {name: Workload(lambda i, name=name: (calls.append((name, i)), time.sleep(0.011))) for name in "ab"}
    samples = interleave(work, Stopwatch(CPU), queued=False, budget=0.0)
    assert [name for name, _ in calls[-6:]] == ["a", "b", "b", "a", "a", "b"]
    assert [i for _, i in calls] == list(range(len(calls)))
    assert all(len(s.seconds) == 3 and s.calls == 1 for s in samples.values())


def test_short_calls_are_timed_many_at_a_time():
    samples = interleave({"a": Workload(lambda i: None)}, Stopwatch(CPU), queued=False, budget=0.0)
    assert samples["a"].calls == 1000
    assert 0 < samples["a"].median < 1e-4


@pytest.mark.parametrize(("seconds", "calls"), [(1e-4, 100), (0.015, 20), (0.2, 5), (2.0, 1)])
def test_a_gpus_steps_are_timed_in_rows_so_that_the_host_hides(seconds, calls):
    seen = []

    def watch(run, n, *, queued):
        seen.append(n)
        return seconds

    watch.device = torch.device("cuda")
    samples = interleave({"a": Workload(lambda i: None)}, watch, queued=False, budget=0.0)
    assert samples["a"].calls == seen[-1] == calls


def test_rotating_buffers_exceed_the_cache():
    from bench.timing import cache_bytes

    assert cache_bytes(CPU) >= 2**20
    assert rotations(1e12, CPU) == 2
    assert rotations(2**20, CPU) * 2**20 > min(cache_bytes(CPU), 64 * 2**20 - 1)


def test_the_networks_work_is_counted():
    """As PERFORMANCE.md and others count it: 12.44 GFLOP an image forward, three times that with the backward."""
    forward, both = network_flops(UNetConfig())
    assert forward == pytest.approx(12.44e9, rel=0.005)
    assert both == pytest.approx(37.3e9, rel=0.005)


def test_without_diffusers_the_peer_is_skipped_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    (comparison,) = test_peers.comparisons(make_size("tiny"))
    with pytest.raises(pytest.skip.Exception, match="diffusers is not installed: pip install"):
        comparison.build()


def test_every_kernel_has_benchmark_cases():
    assert set(test_kernels.CASES) == set(REGISTRY)


@pytest.fixture(scope="module")
def trial(repo, tmp_path_factory):
    """`pytest bench` with all GPU variants at tiny shapes, in a process of its own -> its JSON, its rows, its text."""
    folder = tmp_path_factory.mktemp("trial")
    before = sorted((repo / "bench" / "results").iterdir())
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "--size", "tiny", "--save", folder / "rows.json",
         f"--benchmark-json={folder / 'benchmark.json'}"],
        cwd=repo, capture_output=True, text=True, timeout=280, env=alone,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert sorted((repo / "bench" / "results").iterdir()) == before
    return json.loads((folder / "benchmark.json").read_text()), Results.read(folder / "rows.json"), done.stdout


def test_every_benchmark_runs_and_every_bar_is_judged(trial):
    _, results, text = trial
    groups = {row.group for row in results.rows}
    assert groups == {
        "kernels", "step", "optimizer", "sampler", "loaders", "evaluation", "reliability", "upsampling", "peers",
        "levers",
    }  # fmt: skip
    judged = {re.match(r"bar ([\w ]+):", r.verdict)[1] for row in results.rows for r in row.ratios if r.verdict}
    assert judged == BARS.keys() - {"14 batch 256"}  # whose batch is smaller in the trial
    assert all(row.seconds > 0 and row.rounds >= 3 for row in results.rows)
    assert "skipped" not in text.splitlines()[-1]


def test_pytest_benchmark_tells_the_same_times(trial):
    told, results, _ = trial
    assert len(told["benchmarks"]) == len(results.rows)
    for theirs, ours in zip(told["benchmarks"], results.rows, strict=True):
        assert theirs["group"] == ours.group
        assert theirs["stats"]["median"] == pytest.approx(ours.seconds)
        assert theirs["stats"]["rounds"] == ours.rounds
        assert theirs["extra_info"]["share_of_ceiling"] == ours.share
        assert theirs["extra_info"]["verdicts"] == [r.verdict for r in ours.ratios if r.verdict]


def test_only_a_whole_run_is_one(repo):
    """A part of the suite, or a failed run, must not overwrite the committed results."""
    from bench.conftest import DESELECTED, is_whole

    files = sorted((repo / "bench").glob("test_*.py"))

    def session(paths=files, *, deselected=False, args=("bench",), failed=0):
        items = [SimpleNamespace(path=str(path)) for path in paths]
        config = SimpleNamespace(stash={DESELECTED: deselected}, args=args)
        return SimpleNamespace(items=items, config=config, shouldstop=False, testsfailed=failed)

    assert is_whole(session())
    assert not is_whole(session(files[1:]))
    assert not is_whole(session(deselected=True))
    assert not is_whole(session(args=("bench/test_step.py::test_step[x]",)))
    assert not is_whole(session(failed=1))


def norm_with_an_extra_copy(**inputs):
    x = inputs.pop("x")
    return REGISTRY["group_norm_silu"].reference(x.clone(), **inputs)


def measured_kernel(op):
    """The suite's own comparison of a GroupNorm whose `ours` is `op`."""
    spec = replace(REGISTRY["group_norm_silu"], op=op)
    size = replace(make_size("tiny"), norms=((8, 64, 32),), budget=1.0)
    case = next(test_kernels.CASES[spec.name](size))
    bench = Bench(size)
    with torch.compiler.set_stance("force_eager"):
        rows = bench.measure(test_kernels._comparison(size, spec, case, "forward"))
    return Results(bench.environment, bench.ceilings, [row for row, _ in rows.values()])


def measured_step(plant):
    """A step beside the same step with `plant` called after it."""
    size = replace(make_size("tiny"), budget=1.0)
    bench = Bench(size)

    def build():
        steps, batch = [train_step(size, kernels="torch", compile=False) for _ in range(2)], constant_batch(size)
        return {
            "stock": training_work(size, lambda i: steps[0](batch, i)),
            "ours": training_work(size, lambda i: (steps[1](batch, i), plant())),
        }

    ratios = {"ours": (Against("stock", "higher", "12"),)}
    rows = bench.measure(Comparison("step", "planted", ("stock", "ours"), build, ratios))
    return Results(bench.environment, bench.ceilings, [row for row, _ in rows.values()])


def ratios_only(results):
    """As from another device: absolute times of a busy machine say nothing."""
    return replace(results, environment=results.environment | {"device": "another"})


@pytest.mark.parametrize(
    ("measure", "good", "bad"),
    [
        pytest.param(
            measured_kernel, REGISTRY["group_norm_silu"].reference, norm_with_an_extra_copy, id="copied activations"
        ),
        pytest.param(measured_step, lambda: None, lambda: time.sleep(0.1), id="waiting host"),
    ],
)
def test_a_planted_slowdown_is_flagged(tmp_path, capsys, measure, good, bad):
    def compared(planted):
        """The exit code of comparing results without a plant, as from another device, with these."""
        before, after = tmp_path / "before.json", tmp_path / "after.json"
        results = ratios_only(measure(good))
        replace(results, environment=results.environment | {"device": "first"}).write(before)
        ratios_only(measure(planted)).write(after)
        return compare.main(before, after, tolerance=0.1)

    # A busy machine may disturb one measurement in a direction that looks like a slowdown, but not three.
    assert any(compared(good) == 0 for _ in range(3)), capsys.readouterr().out
    assert any(compared(bad) == 1 for _ in range(2))
    assert "/ ours" in capsys.readouterr().out


@pytest.mark.gpu
def test_queued_calls_exclude_the_host_and_a_wait_is_refused():
    device = torch.device("cuda")
    watch, x = Stopwatch(device), torch.zeros(2**20, device=device)

    def slow_host(i):
        time.sleep(0.002)
        x.add_(1)

    assert watch(slow_host, 5, queued=True) < 0.001 < watch(slow_host, 5, queued=False)
    with pytest.raises(RuntimeError, match="waits for it"):
        watch(lambda i: x.sum().item(), 3, queued=True)

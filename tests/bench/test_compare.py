"""bench/compare.py and bench/table.py on results with known differences."""

import dataclasses
import json
import subprocess
import sys

import pytest

from bench import compare, table
from bench.bars import BARS, verdict
from bench.results import Ratio, Results, Row

ENVIRONMENT = {
    "device": "CPU A 2c", "cpu": "A", "cores": 2, "threads": 2, "driver": None, "cuda": None, "torch": "2.15.0",
    "triton": "3.9.0", "python": "3.11.7", "commit": "abc", "date": "2026-11-23",
}  # fmt: skip


def row(seconds=0.01, speed=2.0, cost=1.1, variant="ours"):
    ratios = (Ratio("stock", speed, "higher", None), Ratio("a copy", cost, "lower", verdict("9", cost)))
    return Row(
        "kernels", "norm", variant, seconds, seconds / 50, rounds=9, calls=3, images_s=None, gb_s=12.3, tflop_s=None,
        share=0.9, ratios=ratios,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path, capsys):
    """Compare two lists of rows as the command does -> exit code, printed text."""

    def go(a, b, *, environment=None, **options):
        for name, rows, env in (("a", a, ENVIRONMENT), ("b", b, environment or ENVIRONMENT)):
            Results(env, {"bytes_s": 1e10, "flops_s": 1e11}, rows).write(tmp_path / f"{name}.json")
        code = compare.main(tmp_path / "a.json", tmp_path / "b.json", **options)
        output = capsys.readouterr()
        return code, " ".join((output.out + output.err).split())

    return go


def test_results_survive_their_file(tmp_path):
    results = Results(ENVIRONMENT, {"bytes_s": 1e10, "flops_s": 1e11}, [row(), row(variant="stock")])
    results.write(tmp_path / "a.json")
    assert Results.read(tmp_path / "a.json") == results


def test_equal_results_pass(run):
    code, text = run([row()], [row()])
    assert code == 0
    assert "the same environment" in text
    assert "0 of 3 numbers worse" in text


@pytest.mark.parametrize(
    ("change", "named"), [({"speed": 1.8}, "speed against stock"), ({"cost": 1.2}, "time against a copy")]
)
def test_a_worse_ratio_is_flagged_in_either_direction(run, change, named):
    code, text = run([row()], [row(**change)])
    assert code == 1
    assert named in text
    assert "1 of 3 numbers worse" in text


def test_a_better_ratio_and_one_within_the_tolerance_pass(run):
    code, text = run([row()], [row(speed=3.0, cost=1.14)])
    assert code == 0
    assert "33.3% better" in text
    assert run([row()], [row(speed=1.5)], tolerance=0.5)[0] == 0
    assert run([row()], [row(cost=1.14)], tolerance=0.03)[0] == 1


def test_absolute_times_count_on_the_same_device_only(run):
    slower = row(seconds=0.02)
    code, text = run([row()], [slower])
    assert code == 1
    assert "median time" in text
    for changed in ({"device": "NVIDIA H100"}, {"threads": 1}):
        code, text = run([row()], [slower], environment=ENVIRONMENT | changed)
        assert code == 0
        assert "only ratios are compared" in text
    code, text = run([row()], [row(speed=1.0)], environment=ENVIRONMENT | {"device": "NVIDIA H100"})
    assert code == 1


def test_the_difference_of_the_environments_is_named(run):
    code, text = run([row()], [row()], environment=ENVIRONMENT | {"torch": "2.11.0", "commit": "def"})
    assert code == 0
    assert "torch: 2.15.0 -> 2.11.0" in text
    assert "commit: abc -> def" in text


def test_what_is_missing_is_named_and_fails_and_nothing_in_common_is_refused(run):
    code, text = run([row(), row(variant="stock")], [row()])
    assert code == 1
    assert "missing from B: kernels norm stock" in text
    code, text = run([row()], [row(), row(variant="stock")])
    assert code == 0
    assert "only in B: kernels norm stock" in text
    fewer = dataclasses.replace(row(), ratios=row().ratios[:1])
    code, text = run([row()], [fewer])
    assert code == 1
    assert "missing from B: kernels norm ours against a copy" in text
    assert run([fewer], [row()])[0] == 0
    code, text = run([row()], [row(variant="stock")])
    assert code == 2
    assert "no benchmark in common" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ("[1]", "is no result of this suite"),
        ('{"benchmarks": []}', "is no result of this suite"),
        ('{"format": "fastdiff-bench-1", "rows": [{"group": "x"}]}', "is damaged"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_that_is_no_result_is_refused_in_one_line(tmp_path, capsys, content, said):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in (lambda: compare.main(path, path), lambda: table.main(path)):
        assert command() == 2
        message = capsys.readouterr().err
        assert said in message
        assert message.count("\n") == 1


def test_a_number_that_is_not_finite_is_refused(tmp_path, capsys):
    Results(ENVIRONMENT, {"bytes_s": 1e10, "flops_s": 1e11}, [row(seconds=float("nan"))]).write(tmp_path / "x.json")
    assert compare.main(tmp_path / "x.json", tmp_path / "x.json") == 2
    assert "is damaged" in capsys.readouterr().err


def test_the_commands_exit_codes(repo, tmp_path):
    Results(ENVIRONMENT, {"bytes_s": 1e10, "flops_s": 1e11}, [row()]).write(tmp_path / "a.json")
    Results(ENVIRONMENT, {"bytes_s": 1e10, "flops_s": 1e11}, [row(speed=1.0)]).write(tmp_path / "b.json")

    def command(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=repo, capture_output=True, text=True, timeout=60)

    assert command("bench/compare.py", str(tmp_path / "a.json"), str(tmp_path / "b.json")).returncode == 1
    bad = command("bench/compare.py", str(tmp_path / "a.json"))
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr
    assert "--tolerance" in command("bench/compare.py", "--help").stdout
    printed = command("bench/table.py", str(tmp_path / "a.json"))
    assert printed.returncode == 0
    assert printed.stdout.startswith("CPU A 2c, 2 threads, torch 2.15.0")
    assert "| kernels | norm | ours | 10 ms | 12.3 GB/s | 90.0% |" in printed.stdout


def test_verdicts():
    assert verdict("9", 1.07) == "bar 9: 1.07, at most 1.15 met, aim 1.05 missed"
    assert verdict("7", 60.0) == "bar 7: 60, at least 10 met, aim 50 met"
    assert verdict("sampler", 1.2) == "bar sampler: 1.2, at most 1.05 missed"


@pytest.mark.parametrize("name", BARS)
def test_an_aim_is_stricter_than_what_is_required(name):
    bar = BARS[name]
    assert bar.aim is None or (bar.aim > bar.least) == (bar.better == "higher")


def test_the_file_is_json_with_a_row_a_line(tmp_path):
    Results(ENVIRONMENT, {"bytes_s": 1e10, "flops_s": 1e11}, [row(), row(variant="stock")]).write(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text)["environment"] == ENVIRONMENT
    assert sum('"variant"' in line for line in text.splitlines()) == 2

"""The one command for a GPU's minutes: its whole order in tiny sizes, what a cut leaves, and the table of bars."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bench import bars, gpu_run
from bench.gpu_run import Stage
from bench.results import Results
from fastdiff.errors import UserError


@pytest.fixture(scope="module")
def trial(repo, tmp_path_factory):
    """The folder of a trial, and what it printed."""
    folder = tmp_path_factory.mktemp("gpu")
    out, images = folder / "run", np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    command = [sys.executable, "bench/gpu_run.py", "1200", "--size", "tiny", "--data", str(folder / "images.npz"),
               "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, cwd=repo, env=alone, capture_output=True, text=True, timeout=580)
    log = (out / "log.txt").read_text() if (out / "log.txt").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log[-5000:]
    return out, done.stdout


@pytest.mark.timeout(600)  # a minute and a half where nothing else runs
def test_every_stage_runs_and_few_small_files_come_back(trial):
    out, told = trial
    record = gpu_run.read_run(out)
    assert [stage["ended"] for stage in record["stages"]] == ["done"] * 10
    assert told.count("  done") == 10
    names = {path.name for path in out.iterdir()}
    assert names == {"run.json", "log.txt", "rows.json", "profile.md", "tuned.py", "track.jsonl", "track.png",
                     "samples.png"}  # fmt: skip
    assert all(0 < path.stat().st_size < 16 * 2**20 for path in out.iterdir())
    groups = {row.group for row in Results.read(out / "rows.json").rows}
    assert groups == {"step", "levers", "sampler", "loaders", "evaluation", "optimizer", "kernels"}
    assert {row.variant for row in Results.read(out / "rows.json").rows} >= {"no combo_kernels", "tuned norms"}
    assert len((out / "track.jsonl").read_text().splitlines()) >= 1


def test_the_table_of_bars_comes_from_its_files(trial, tmp_path, capsys):
    out, _ = trial
    with pytest.raises(UserError, match="trial in tiny sizes"):
        bars.main(out)
    assert bars.main(out, out=tmp_path / "bars.md") == 0
    text = (tmp_path / "bars.md").read_text()
    assert text in capsys.readouterr().out
    lines = [line.split(" | ") for line in text.splitlines() if line[:3].strip("| ").isdigit()]
    assert len(lines) == 16
    holds = {int(line[0].strip("| ")): line[-1].strip(" |") for line in lines}
    assert holds[4] == holds[5] == "met"  # counted
    assert holds[6] == "not measured"  # tests that a CPU skips
    assert holds[11] in ("met", "missed", "aim")
    assert holds[8] == "not measured; not measured"  # a trial leaves these kernels out


def test_a_table_judges_the_worst_value():
    text = bars.table({"8 forward": [1.05, 1.2, 1.3], "14 batch 1": [7.0, 4.5], "9": [1.0]}, "Somewhere")
    assert "| 1.3 (best 1.05); - | <= 1.25; <= 1.4 | <= 1.1; <= 1.2 | missed; not measured |" in text
    assert "| 4.5 (best 7); -; - |" in text
    assert "| met; not measured; not measured |" in text
    assert "| 1 | <= 1.15 | <= 1.05 | aim |" in text


def python(name, code, share=1, **more):
    return Stage(name, share, ("-c", code), **more)


def test_what_fails_or_takes_too_long_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    left = "import pathlib, time; pathlib.Path('{}').write_text('half'); print('here', flush=True); time.sleep(99)"
    monkeypatch.setattr(gpu_run, "GRACE", 1)
    monkeypatch.setattr(
        gpu_run,
        "stages",
        lambda out, work, data, size: [
            python("fails", "raise SystemExit(3)"),
            python("sleeps", left.format(work / "a.txt"), keep=(("*.txt", "kept.txt"),)),
            python("prints much", "print('x' * 3_000_000); print('end')", share=50),
            python("runs", "print('well')", share=5),
        ],
    )
    began = time.monotonic()
    assert gpu_run.main(60, out=out) == 1
    assert time.monotonic() - began < 30
    ended = {stage["name"]: stage["ended"] for stage in json.loads((out / "run.json").read_text())["stages"]}
    assert ended == {"fails": "failed: exit code 3", "sleeps": "out of time", "prints much": "done", "runs": "done"}
    assert (out / "kept.txt").read_text() == "half"
    log = (out / "log.txt").read_text()
    assert len(log) < gpu_run.LOG + 2000
    for text in ("fails: at most", "here", "end", "well"):
        assert text in log
    with pytest.raises(UserError, match="is not empty"):
        gpu_run.main(60, out=out)
    with pytest.raises(UserError, match="at least 60"):
        gpu_run.main(5, out=tmp_path / "other")


def test_a_stop_leaves_no_process_and_what_was_measured(repo, tmp_path):
    program = (
        "import sys; sys.path.insert(0, '.'); from pathlib import Path; from bench import gpu_run\n"
        "from bench.gpu_run import Stage, main\n"
        "gpu_run.stages = lambda *_: [Stage('a', 1, ('-c', '1')), Stage('b', 99, ('-c', "
        "'import os, time; print(os.getpid(), flush=True); time.sleep(99)'))]\n"
        f"main(90, out=Path({str(tmp_path / 'out')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=repo, stdout=subprocess.DEVNULL)
    log = tmp_path / "out" / "log.txt"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().splitlines()[-1].isdigit()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = int(log.read_text().splitlines()[-1])
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert [stage["name"] for stage in gpu_run.read_run(tmp_path / "out")["stages"]] == ["a"]
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no run\.json"):
        gpu_run.read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"format": "another"}')
    with pytest.raises(UserError, match="format another"):
        gpu_run.read_run(tmp_path)


@pytest.mark.parametrize("size", ["gpu", "tiny"])
def test_the_shares_are_seconds_of_540_and_the_files_are_there(repo, tmp_path, size):
    found = gpu_run.stages(tmp_path, tmp_path, "digits", size)
    assert sum(stage.share for stage in found) == 540
    files = [word for stage in found for word in stage.command if word.endswith(".py") and tmp_path.name not in word]
    assert len(files) > 15
    assert all((repo / file).is_file() for file in files)

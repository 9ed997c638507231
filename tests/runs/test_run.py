import csv
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from fastdiff.errors import UserError
from fastdiff.runs.files import write_atomically
from fastdiff.runs.run import CSV_HEADER, create_run, open_run
from tests.reporting.rows import EVAL, TRAIN


def python(repo, code, *args, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=repo,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


HOLD = """
import sys
from fastdiff.runs.run import create_run, open_run
run = open_run(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(repo, tmp_path):
    """A run that another process holds open: (its path, that process)."""
    path = made(tmp_path)
    holder = python(repo, HOLD, path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    yield path, holder
    holder.kill()
    holder.communicate()


def made(tmp_path, **config):
    with create_run(tmp_path, config=config) as run:
        return run.path


def step_row(step, **more):
    return {"step": step, "images": 64 * step, **more}  # no column that TensorBoard shows


def csv_rows(path):
    """The CSV as rows: cells parsed as JSON does where they are numbers, empty ones left out."""

    def parse(cell):
        try:
            return json.loads(cell)
        except ValueError:
            return cell

    with open(path / "metrics.csv", newline="") as file:
        return [{name: parse(cell) for name, cell in row.items() if cell != ""} for row in csv.DictReader(file)]


def json_rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


class TestNumbers:
    def test_count_up_from_one_above_the_highest(self, tmp_path):
        root = tmp_path / "a" / "working"
        assert [made(root).name for _ in range(2)] == ["1", "2"]
        (root / "12").mkdir()
        (root / "99.bak").mkdir()
        (root / "13").touch()
        assert made(root) == root / "14"

    def test_eight_processes_at_once(self, repo, tmp_path):
        code = """
import os, sys
from fastdiff.runs.run import create_run
print("ready", flush=True)
sys.stdin.readline()
print(create_run(sys.argv[1], config={"pid": os.getpid()}).path.name)
"""
        processes = [python(repo, code, tmp_path / "working") for _ in range(8)]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        names = {}
        for process in processes:
            out, err = process.communicate(timeout=30)
            assert process.returncode == 0, err
            names[process.pid] = out.strip()
        assert sorted(names.values(), key=int) == [str(n) for n in range(1, 9)]
        for pid, name in names.items():
            assert json.loads((tmp_path / "working" / name / "config.json").read_text()) == {"pid": pid}

    def test_a_root_that_cannot_be(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"file: cannot make a run directory here \(.*\); choose"):
            create_run(tmp_path / "file", config={})


class TestDirectory:
    def test_layout_and_config(self, tmp_path):
        with create_run(tmp_path, config={"lr": 2e-4, "resolutions": (16, 8), "data": None}) as run:
            assert run.path == tmp_path / "1"
            assert run.config == {"lr": 2e-4, "resolutions": [16, 8], "data": None}
            assert run.checkpoints == run.path / "checkpoints"
            assert run.saves == run.path / "saves"
            assert sorted(entry.name for entry in run.path.iterdir()) == sorted(
                ["checkpoints", "config.json", "lock", "metrics.csv", "metrics.jsonl", "saves"]
            )
            assert json.loads((run.path / "config.json").read_text()) == run.config
        with open_run(str(run.path)) as again:
            assert again.config == run.config
            assert again.path == run.path

    @pytest.mark.parametrize("config", [{"a": object()}, {"a": math.nan}])
    def test_config_that_is_no_json_leaves_no_directory(self, tmp_path, config):
        with pytest.raises((TypeError, ValueError)):
            create_run(tmp_path, config=config)
        assert not list(tmp_path.iterdir())

    def test_no_run_directory(self, tmp_path):
        for path in (tmp_path, tmp_path / "missing"):
            with pytest.raises(UserError, match=f"^{path}: no run directory "):
                open_run(path)
        assert not list(tmp_path.iterdir())

    def test_damaged_config(self, tmp_path):
        path = made(tmp_path)
        (path / "config.json").write_text('{"a": ')
        with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON"):
            open_run(path)

    def test_import_is_light(self, repo):
        code = "import sys, fastdiff.runs.run; print([m for m in ('torch', 'tensorboard') if m in sys.modules])"
        assert python(repo, code).communicate(timeout=30)[0] == "[]\n"


class TestLock:
    def test_second_opener_is_told_the_holder(self, held):
        path, holder = held
        began = time.monotonic()
        with pytest.raises(UserError) as error:
            open_run(path)
        assert time.monotonic() - began < 1
        assert re.fullmatch(
            rf"{path}: in use by another process \(pid {holder.pid}, host {re.escape(socket.gethostname())}, "
            r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+00:00\); .*",
            str(error.value),
        )

    def test_a_new_run_is_locked_too(self, tmp_path):
        with create_run(tmp_path, config={}) as run, pytest.raises(UserError, match=f"pid {os.getpid()},"):
            open_run(run.path)

    def test_free_after_close(self, tmp_path):
        run = create_run(tmp_path, config={})
        run.close()
        run.close()
        assert (run.path / "lock").read_text() == ""
        open_run(run.path).close()

    def test_free_after_kill_9(self, held):
        path, holder = held
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert f"pid {holder.pid}," in (path / "lock").read_text()  # it had no time to tidy up
        open_run(path).close()

    def test_free_after_close_though_a_forked_child_lives(self, repo, tmp_path):
        code = """
import os, signal, sys, time
from fastdiff.runs.run import create_run, open_run
run = create_run(sys.argv[1], config={})
child = os.fork()
if child == 0:
    time.sleep(30)
    os._exit(0)
try:
    run.close()
    open_run(run.path).close()
finally:
    os.kill(child, signal.SIGKILL)
"""
        process = python(repo, code, tmp_path)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0, err


class TestRows:
    def test_text_of_both_files(self, tmp_path):
        with create_run(tmp_path, config={}) as run:
            run.log_train(TRAIN)
            run.log_eval(EVAL)
            assert run.train_rows() == [{"kind": "train", **TRAIN}]
            assert run.eval_rows() == [{"kind": "eval", **EVAL}]
        lines = (run.path / "metrics.jsonl").read_text().split("\n")
        assert lines[0] == (
            '{"kind": "train", "step": 100, "images": 6400, "loss": 0.30000000000000004, "grad_norm": 1e-07, '
            '"lr": 0.0002, "images_per_second": 3210.5, "seconds": 12.25}'
        )
        assert [json.loads(line) for line in lines[:2]] == [{"kind": "train", **TRAIN}, {"kind": "eval", **EVAL}]
        assert lines[2:] == [""]
        assert (run.path / "metrics.csv").read_text().split("\n") == [
            "kind,step,images,loss,grad_norm,lr,images_per_second,seconds,skipped,gap,"
            "metric,value,samples,sampler,sampler_steps,eta,features,feature_size,reference,checkpoint,"
            "labels,guidance,guidance_interval,guide,label_agreement,label_agreement_real,"
            "psnr,ssim,latent_mean,latent_std",
            "train,100,6400,0.30000000000000004,1e-07,0.0002,3210.5,12.25,,,,,,,,,,,,,,,,,,,,,,",
            "eval,100,6400,,,,,3.5,,,fd_efficientnet_lite0,1.75,500,ddim,50,0.0,efficientnet_lite0,96,"
            '"digits, ""train""",checkpoints/step-100,,,,,,,,,,',
            "",
        ]

    def test_rows_are_there_at_once_and_equal_in_both_files(self, tmp_path):
        with create_run(tmp_path, config={}) as run:
            rows = []
            for step in range(5):
                row = step_row(step, seconds=step / 7)
                rows.append({"kind": "train", **row})
                run.log_train(row)
                assert json_rows(run.path) == csv_rows(run.path) == rows
        with open_run(run.path) as run:
            run.log_eval(step_row(5, sampler="ddpm"))
            assert json_rows(run.path) == csv_rows(run.path) == [*rows, {"kind": "eval", **step_row(5, sampler="ddpm")}]

    def test_numpy_numbers(self, tmp_path):
        with create_run(tmp_path, config={}) as run:
            run.log_train({"step": np.int64(3), "seconds": np.float32(0.1)})
            assert run.train_rows() == [{"kind": "train", "step": 3, "seconds": float(np.float32(0.1))}]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
    def test_non_finite(self, tmp_path, value):
        with create_run(tmp_path, config={}) as run:
            run.log_train(step_row(1, seconds=value))
            assert run.train_rows() == [{"kind": "train", **step_row(1, seconds=None)}]
            assert (run.path / "metrics.jsonl").read_text().endswith('"seconds": null}\n')
            assert csv_rows(run.path) == [{"kind": "train", **step_row(1)}]

    @pytest.mark.parametrize(
        ("kind", "row", "error", "message"),
        [
            ("train", {"step": 1, "losss": 0.1}, ValueError, r"train row with unknown columns \['losss'\]"),
            ("train", {"step": 1, "value": 0.1}, ValueError, "unknown columns"),
            ("eval", {"step": 1, "loss": 0.1}, ValueError, "eval row with unknown columns"),
            ("train", {"loss": 0.1}, ValueError, "no step"),
            ("train", {"step": 1, "loss": torch.tensor(0.1)}, TypeError, "loss: Tensor cannot be logged"),
        ],
    )
    def test_bugs_are_errors_and_write_nothing(self, tmp_path, kind, row, error, message):
        with create_run(tmp_path, config={}) as run:
            with pytest.raises(error, match=message):
                (run.log_train if kind == "train" else run.log_eval)(row)
            assert json_rows(run.path) == csv_rows(run.path) == []

    def test_truncate(self, tmp_path):
        with create_run(tmp_path, config={}) as run:
            for step in (0, 10, 20, 30):
                run.log_eval(step_row(step))
                run.log_train(step_row(step))
            run.truncate(20)
            run.log_train(step_row(25))
            expected = [(kind, step) for step in (0, 10, 20) for kind in ("eval", "train")] + [("train", 25)]
            assert [(row["kind"], row["step"]) for row in json_rows(run.path)] == expected
            assert csv_rows(run.path) == json_rows(run.path)
            assert [row["step"] for row in run.eval_rows()] == [0, 10, 20]
        assert not list(run.path.glob("*.tmp")) + list(run.path.glob(".*.tmp"))


class TestRepair:
    @pytest.fixture
    def logged(self, tmp_path):
        with create_run(tmp_path, config={}) as run:
            for step in (1, 2):
                run.log_train(step_row(step, seconds=0.5))
        return run.path

    @pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv"])
    def test_half_a_line_at_every_byte(self, logged, name):
        path = logged / name
        whole = path.read_bytes()
        first, last = whole.splitlines(keepends=True)[-2:]
        for cut in range(len(whole) - len(last), len(whole)):
            path.write_bytes(whole[:cut])
            with open_run(logged) as run:
                # Without its newline alone, the JSON is complete; the CSV is made from the JSON.
                steps = [1, 2] if name == "metrics.csv" or cut == len(whole) - 1 else [1]
                assert [row["step"] for row in run.train_rows()] == steps
                assert json_rows(logged) == csv_rows(logged) == run.train_rows()
                run.log_train(step_row(3))
                assert [row["step"] for row in json_rows(logged)] == [*steps, 3]
            with open_run(logged) as run:
                run.truncate(1)
                run.log_train(step_row(2, seconds=0.5))
            assert path.read_bytes() == whole
        assert first in whole

    def test_a_tail_of_zeros_and_missing_files(self, logged):
        whole = (logged / "metrics.jsonl").read_bytes()
        (logged / "metrics.jsonl").write_bytes(whole + bytes(512))
        (logged / "metrics.csv").unlink()
        (logged / "saves").rmdir()
        with open_run(logged) as run:
            assert run.saves.is_dir()
        assert (logged / "metrics.jsonl").read_bytes() == whole
        assert csv_rows(logged) == json_rows(logged)

    @pytest.mark.parametrize("line", ["{half", "[1]", '{"kind": "test", "step": 1}', '{"kind": "train"}'])
    def test_damage_before_the_last_line_is_told_and_kept(self, logged, line):
        path = logged / "metrics.jsonl"
        damaged = line + "\n" + path.read_text()
        path.write_text(damaged)
        for _ in range(2):  # and the lock is free again
            with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: not a row of metrics"):
                open_run(logged)
        assert path.read_text() == damaged

    def test_unknown_column_in_the_file(self, logged):
        path = logged / "metrics.jsonl"
        path.write_text('{"kind": "train", "step": 0, "vibes": 1}\n')
        with pytest.raises(UserError, match=r"line 1: unknown columns \['vibes'\]"):
            open_run(logged)

    def test_kill_9_while_logging(self, repo, tmp_path):
        code = """
import itertools, sys
from fastdiff.runs.run import create_run
run = create_run(sys.argv[1], config={})
for step in itertools.count():
    run.log_train({"step": step, "seconds": step / 7})
    if step == 100:
        print("busy", flush=True)
"""
        process = python(repo, code, tmp_path)
        assert process.stdout.readline() == "busy\n"
        process.kill()
        process.communicate()
        for name in ("metrics.jsonl", "metrics.csv"):
            assert (tmp_path / "1" / name).read_bytes().endswith(b"\n")
        rows = json_rows(tmp_path / "1")
        assert [row["step"] for row in rows] == list(range(len(rows)))
        assert len(rows) > 100


def test_header_holds_each_column_once():
    assert len(set(CSV_HEADER)) == len(CSV_HEADER) == 30


def test_write_atomically_keeps_the_old_file_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "a" / "file"
    write_atomically(path, b"old")

    def fail(_):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_full_disk_at_the_start_is_one_line_and_leaves_no_directory(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdiff.runs.run.write_atomically", full)
    with pytest.raises(UserError, match=r"No space left on device; [\d,]+ bytes are free.; free some space"):
        create_run(tmp_path / "working", config={})
    assert list((tmp_path / "working").iterdir()) == []


def test_a_config_that_a_full_disk_refuses_is_told_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with create_run(tmp_path, config={"a": 1}) as run:
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=f"{run.path}: .*No space left"):
            run.record_config({"a": 2})
        monkeypatch.undo()
        assert json.loads((run.path / "config.json").read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("told", "rows"),
    [
        ({"few_step": "consistency", "teacher": "{other}"}, 1),
        ({"few_step": "consistency", "init_from": "{other}/checkpoints/step-5"}, 1),
        ({"few_step": "none", "init_from": "{other}"}, 0),  # a run of its own
        ({"few_step": "flow-map"}, 0),
        ({"few_step": "consistency", "teacher": "gone"}, 0),
    ],
)
def test_a_student_reads_its_teachers_evaluations(tmp_path, told, rows):
    with create_run(tmp_path / "runs", config={}) as other:
        other.log_eval({"step": 5, "metric": "fid", "value": 3.0})
        other.log_train({"step": 5, "loss": 1.0})
    told = {name: value.format(other=other.path) for name, value in told.items()}
    tuning = {name: told.pop(name) for name in ("few_step", "teacher") if name in told}
    with create_run(tmp_path / "runs", config={"tuning": tuning, "optim": told}) as run:
        assert [row["value"] for row in run.teacher_rows()] == [3.0] * rows

import json
import math
import os
import re
import signal
import socket
import time

import pytest

from fastdiff.errors import UserError
from fastdiff.runs.files import write_atomically
from fastdiff.runs.run import create_run, open_run
from tests.runs.opened import made, python

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
    def test_permissions_are_as_the_umask_has_them(self, tmp_path, modes):
        create_run(tmp_path, config={}).close()
        assert modes(tmp_path) == {"0o770", "0o660"}

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
        for text in ('{"a": ', "[1]", "[" * 100_000):
            (path / "config.json").write_text(text)
            with pytest.raises(UserError, match=r"config\.json: cannot be read as a JSON object"):
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
        ({"few_step": "consistency", "teacher": "~nobody-of-this-name/1"}, 0),
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

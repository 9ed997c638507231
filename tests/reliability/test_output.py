"""Readers that go away, terminals that close, and the signals that come with them: training goes on, or saves."""

import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from fastdiff.runs import checkpoint
from tests.configs import flags_of
from tests.reliability import jobs
from tests.reliability.conftest import counts

HUP, INT, TERM = signal.SIGHUP, signal.SIGINT, signal.SIGTERM


def start(kind, path, config, until, *arguments):
    """A run that writes to a pipe or a terminal, whose reader goes away when it has seen the text."""
    master, slave = os.openpty() if kind == "terminal" else (None, None)
    if kind == "pipe":
        os.mkfifo(path)

    def read():
        reader, seen = os.open(path, os.O_RDONLY) if kind == "pipe" else master, b""
        while until not in seen:
            seen += os.read(reader, 4096)
        for end in (reader, slave):
            if end is not None:
                os.close(end)

    thread = threading.Thread(target=read)
    thread.start()
    process = jobs.start(jobs.train_run, config, *arguments, log=path if kind == "pipe" else os.ttyname(slave))
    thread.join(120)
    return process


@counts(fast=4, slow=40)
def test_a_run_goes_on_without_its_reader(tiny_config, tmp_path, promise, count):
    with promise("Output: its reader goes away at any moment, the run goes on and says so once", "readers") as p:
        for index in range(count):
            kind, steps = ("pipe", "terminal")[index % 2], 30
            until = f"step {jobs.random_source('reader', index).randint(0, 6)}/" if index > 1 else "ranks"
            run = tmp_path / f"run-{index}" / "1"
            with p.case(f"{kind}, until {until}"):
                config = tiny_config(f"run-{index}", steps=steps, eval_every=15)
                process = start(kind, tmp_path / f"pipe-{index}", config, until.replace("step 0/", "run ").encode())
                assert jobs.finish(process) == 0
                assert [row["step"] for row in jobs.rows(run)] == list(range(1, steps + 1))
                assert checkpoint.load_latest(run / "checkpoints").step == steps
                log = (run / "log.txt").read_text()
                reason = {"pipe": "Broken pipe", "terminal": "Input/output error"}[kind]
                assert log.count(f"stdout cannot be written to ({reason})") == 1
                assert "done at step 30\n" in log


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize(
    "signals", [[INT], [TERM], [HUP], [HUP, HUP, TERM, HUP]], ids=lambda each: "-".join(s.name for s in each)
)
def test_signals_that_come_with_it_save(tiny_config, tmp_path, kind, signals):
    """Ctrl-C ends `tee` as well; of a terminal that closes, shell and kernel tell by a SIGHUP each."""
    process = start(kind, tmp_path / "pipe", tiny_config(steps=None, log_every=1000), b"run ")
    for number in signals:
        os.kill(process.pid, number)
    code = jobs.finish(process)
    run = tmp_path / "working" / "1"
    found = checkpoint.load_latest(run / "checkpoints")
    (name, step) = re.search(r"stopped by (\w+) at step (\d+)", (run / "log.txt").read_text()).groups()
    assert found.step == int(step)
    assert name in {s.name for s in signals}
    assert code == 128 + signal.Signals[name]


def test_nohup_means_no_hangup(tiny_config, tmp_path):
    config = tiny_config(steps=40)
    process = start("terminal", tmp_path, config, b"step 2/", None, (signal.signal, HUP, signal.SIG_IGN))
    os.kill(process.pid, HUP)
    assert jobs.finish(process) == 0
    assert checkpoint.load_latest(tmp_path / "working" / "1" / "checkpoints").step == 40


def test_a_folder_whose_name_the_locale_cannot_read(tiny_config, tmp_path):
    """Python reads an umlaut so where it takes the locale for ASCII."""
    config, log = tiny_config("l\udcc3\udca4ufe", steps=2, eval_every=2), tmp_path / "log"
    assert jobs.finish(jobs.start(jobs.train_whole, config, (int,), log=log)) == 0, log.read_text()
    assert "done: look at " in log.read_text()
    assert (tmp_path / "läufe" / "1" / "saves" / "samples-00000002.png").exists()


RUN = """
import sys, train_cifar
from fastdiff.training import train
train.plot = lambda *arguments: None
sys.exit(train_cifar.run_command(train_cifar.main))
"""


@pytest.mark.parametrize(
    ("pipe", "steps", "codes"),
    [("| head -n 2", "10", "0 0"), ("| { head -n 12; kill -INT $(cat pid); }", "1000000", "130 0")],
)
def test_pipelines_as_a_user_types_them(tiny_config, tmp_path, repo, pipe, steps, codes):
    """To the end of the process, where Python itself flushes what is left."""
    flags = " ".join(flags_of(tiny_config()))
    python = f"{sys.executable} -c '{RUN}' {flags} --steps {steps} 2>&1"
    command = f"{{ echo $BASHPID > pid; exec {python}; }} {pipe}; echo ${{PIPESTATUS[*]}}"
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.splitlines()[-1] == codes, done.stdout + done.stderr
    assert checkpoint.load_latest(tmp_path / "working" / "1" / "checkpoints").step > 0

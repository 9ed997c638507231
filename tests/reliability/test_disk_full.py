"""The disk fills up in the middle of a run, at any byte of what it writes, and is freed again later."""

import csv
import json
import re
import shutil
import subprocess

import pytest

from tests.reliability import jobs
from tests.reliability.conftest import counts

FULL, FREED = 10, 20  # steps


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB in memory; skipped where mounting is not permitted."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def check(tmp_path, run, config, hook, left):
    """The run trains through it, says what happened, and has every row and a good last checkpoint in the end."""
    log = tmp_path / f"log-{left}"
    process = jobs.start(jobs.train_run, config, None, (hook, FULL, FREED, left, run), log=log)
    assert jobs.finish(process) == 0, log.read_text()[-3000:]
    text = log.read_text()
    assert re.search(
        r"the checkpoint of step 1\d could not be written to .* "
        r"\([\d,]+ bytes are free, about [\d,]+ are needed\); "
        r"the last good checkpoint is .*step-\d+\. Training goes on",
        text,
    ), text[-3000:]
    jobs.check_run(run, 30)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))
    with (run / "metrics.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == steps


@counts(fast=3, slow=20)
def test_a_full_tmpfs(tiny_config, tmp_path, small_disk, promise, count):
    with promise("Disk full (tmpfs): training goes on, nothing that was saved is harmed", "byte offsets") as p:
        for index in range(count):
            left = jobs.random_source("tmpfs", index).randrange(0, 1_150_000)  # of a checkpoint of 1.2 MB
            root = small_disk / f"runs-{index}"
            with p.case(f"{left} bytes left"):
                config = tiny_config(root, save_every=5, keep_last=2)
                check(tmp_path, root / "1", config, jobs.fill_disk, left)
            shutil.rmtree(root)


@counts(fast=3, slow=20)
def test_files_that_cannot_grow(tiny_config, tmp_path, promise, count):
    """By a limit of the process (RLIMIT_FSIZE), which needs no rights."""
    with promise(
        "Disk full (file size limit): training goes on, nothing that was saved is harmed", "byte offsets"
    ) as p:
        for index in range(count):
            # Up to the checkpoint's largest file; the log is one, too.
            limit = jobs.random_source("limit", index).randrange(8_000, 650_000)
            root = tmp_path / f"runs-{index}"
            with p.case(f"limit of {limit} bytes"):
                config = tiny_config(root, save_every=5, keep_last=2)
                check(tmp_path, root / "1", config, jobs.limit_files, limit)


def test_a_run_that_cannot_save_its_last_step_fails(tiny_config, tmp_path):
    config, log = tiny_config(steps=12, save_every=5), tmp_path / "log"
    hook = (jobs.limit_files, 11, 99, 5000, tmp_path / "working" / "1")
    assert jobs.finish(jobs.start(jobs.train_run, config, None, hook, log=log)) == 1
    assert re.search(
        r"error: the checkpoint of step 12 could not .*step-10\. Free some space and resume", log.read_text()
    )

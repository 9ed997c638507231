"""Runs that are made in a moment, and processes beside them."""

import subprocess
import sys

from fastdiff.runs.run import create_run


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


def made(tmp_path, **config):
    with create_run(tmp_path, config=config) as run:
        return run.path


def step_row(step, **more):
    return {"step": step, "images": 64 * step, **more}  # no column that TensorBoard shows

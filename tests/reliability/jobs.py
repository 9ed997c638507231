"""What the tests run in processes of their own; `start` forks them from a server that has imported torch already."""

import ctypes
import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # imported here, once, and not in every process that is forked

from fastdiff.cli import run_command
from fastdiff.config import Config
from fastdiff.data import download
from fastdiff.data.loaders import Loader
from fastdiff.errors import UserError
from fastdiff.reporting import pictures
from fastdiff.runs import checkpoint
from fastdiff.runs.async_save import BackgroundSaver
from fastdiff.runs.run import open_run
from fastdiff.runtime.signals import StopRequest
from fastdiff.training import train
from fastdiff.training.step import TrainStep
from fastdiff.training.torch_adam import TorchAdam

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.reliability.jobs"])


def start(job: Callable, *arguments: Any, log: Path) -> multiprocessing.Process:
    """Start `job(*arguments)` in a new process, whose output goes to `log`; it ends with the job's return value."""
    process = _context.Process(target=_run, args=(job, arguments, str(log)), daemon=True)
    process.start()
    return process


def finish(process: multiprocessing.Process, timeout: float = 240.0) -> int:
    """Wait for a process; returns its exit code, or minus the number of the signal that ended it."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"the process did not end within {timeout:g} s")
    return process.exitcode


def _run(job: Callable, arguments: tuple, log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    try:
        status = job(*arguments)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def state(step: int) -> dict[str, Any]:
    """What a small run would save after `step` steps."""
    generator = torch.Generator().manual_seed(step)
    weights = {f"layer.{i}": torch.randn(64, 33, generator=generator) for i in range(8)}
    moments = {i: {"step": torch.tensor(float(step)), "exp_avg": w.clone()} for i, w in enumerate(weights.values())}
    return {
        "model": weights,
        "ema": {name: w / 2 for name, w in weights.items()},
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": list(range(8))}]},
        "loss_history": [[i, 1 / (i + 1)] for i in range(step)],
    }


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same_state(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same_state(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def save_until_killed(run_path: Path, acknowledged: int) -> None:
    """Log and save step after step from where the run stands; each saved step's number is written to a pipe."""
    with open_run(run_path) as run:
        checkpoint.recover(run.checkpoints)
        found = checkpoint.load_latest(run.checkpoints)
        step = found.step if found else 0
        run.truncate(step)
        while True:
            step += 1
            run.log_train({"step": step, "images": step})
            # Every other step is saved twice, as around an evaluation.
            for _ in range(1 + step % 2):
                checkpoint.save(run.checkpoints, step, state(step))
                os.write(acknowledged, f"{step}\n".encode())
            checkpoint.prune(run.checkpoints, step, keep_last=2, keep_steps=set())


def rows(run: Path) -> list[dict]:
    """A run's metrics without measured times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in found]


def saved(run: Path) -> dict:
    """The state of its newest checkpoint, without what differs from run to run."""
    state = dict(checkpoint.load_latest(run / "checkpoints").state)
    for name in ("seconds", "last_log", "config"):  # measured times, and the run's own folder
        del state[name]
    return state


def train_run(config: Config, resume: Path | None = None, hook: tuple | None = None, *, plots: bool = False) -> int:
    """`train_cifar.py` on a config; `hook` is a function of this file and its arguments.

    Without `plots` it draws no curves, which would take most of a short run's time.
    """
    if not plots:
        train.plot = lambda *arguments: None
        pictures.save_labelled = lambda *arguments: None
    make = BackgroundSaver.__init__
    BackgroundSaver.__init__ = lambda self, directory: (make(self, directory), _savers.append(self))[0]
    if hook is not None:
        hook[0](*hook[1:])
    return run_command(lambda: train.train(config, resume=resume))


_savers: list[BackgroundSaver] = []


def settle() -> None:
    """Wait for the save that is under way."""
    for saver in _savers:
        saver.wait()


def before_step(index: int, action: Callable[[TrainStep], None]) -> None:
    """Call `action` when the step `index` (from 0) begins."""
    real = TrainStep.__call__

    def call(self, images, at, of=None):
        if at == index:
            action(self)
        return real(self, images, at, of)

    TrainStep.__call__ = call


def train_whole(config: Config, hook: tuple) -> int:
    """All that `train_cifar.py` does."""
    return train_run(config, None, hook, plots=True)


def stop_after(steps: int) -> None:
    """A hook: SIGTERM during the last of `steps` steps."""
    before_step(steps - 1, lambda _: os.kill(os.getpid(), signal.SIGTERM))


def random_source(*key: Any) -> random.Random:
    """A generator of its own for each case, the same in every run."""
    return random.Random(json.dumps(key))


PHASES = {
    "data": (Loader, "__next__"),
    "step": (TrainStep, "__call__"),
    "accumulating": (TorchAdam, "add"),  # once for each part of a batch
    "saving": (checkpoint, "write_synced"),
    "sampling": (StopRequest, "check"),  # asked at every sampling step
    "evaluating": (pictures, "save_grid"),
}


def in_phase(phase: str, nth: int, action: Callable, *arguments: Any) -> None:
    """A hook: `action` at the nth time that the run comes to `phase`."""
    owner, name = PHASES[phase]
    real, calls = getattr(owner, name), itertools.count(1)

    def call(*a, **k):
        if next(calls) == nth:
            action(*arguments)
        return real(*a, **k)

    setattr(owner, name, call)


def signal_myself(number: int, sent: Path) -> None:
    """Send this process a signal, and note when."""
    sent.write_text(repr(time.time()))
    os.kill(os.getpid(), number)


def busy_in_c(begun: Path) -> None:
    """Be for minutes in one call into C, during which Python runs no handler in this thread."""
    begun.touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def limit_files(first: int, last: int, limit: int, run: Path) -> None:
    """A hook: from step `first` to `last` no file can grow beyond `limit` bytes; then the run must still be good."""

    def full(_):
        settle()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def free(_):
        settle()
        check_run(run, first)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    before_step(first, full)
    before_step(last, free)


def fill_disk(first: int, last: int, left: int, run: Path) -> None:
    """A hook: from step `first` to `last` the disk of the run has only `left` bytes left."""
    filler = run.parent.parent / "filler"

    def full(_):
        settle()
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
            file.truncate(file.tell() - left)

    def free(_):
        settle()
        check_run(run, first)
        filler.unlink()

    before_step(first, full)
    before_step(last, free)


def check_run(run: Path, step: int) -> None:
    """The last checkpoint up to `step` verifies, nothing half-written lies beside it, no line is cut."""
    found = checkpoint.load_latest(run / "checkpoints")
    assert found is not None
    assert found.skipped == []
    assert found.step <= step
    assert not list((run / "checkpoints").glob(".saving-*"))
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (run / name).read_bytes().endswith(b"\n")


def hold(path: Path, barrier: Any, result: Path) -> int:
    """Open a run at the same time as others; hold it until killed, or note how soon and why it was refused."""
    barrier.wait()
    began = time.monotonic()
    try:
        open_run(path)
    except UserError as error:
        seconds = time.monotonic() - began
        result.with_suffix(".tmp").write_text(json.dumps({"pid": os.getpid(), "error": str(error), "seconds": seconds}))
        result.with_suffix(".tmp").rename(result)
        return 1
    result.with_suffix(".tmp").write_text(json.dumps({"pid": os.getpid(), "error": None}))
    result.with_suffix(".tmp").rename(result)
    signal.pause()
    return 0


def fetch(url: str, path: Path, digest: str, size: int, barrier: Any) -> int:
    """Fetch a file at the same time as others."""
    barrier.wait()
    download.fetch(url, path, algorithm="sha256", digest=digest, size=size)
    return 0


def memory() -> int:
    """Bytes that this process has in use, resident, files aside.

    Without what the allocator keeps of freed memory: that swings by 100 MB, with the order in which it was freed.
    """
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"^RssAnon:\s*(\d+) kB", status, re.MULTILINE)[0])


def watch_memory(steps: Sequence[int], result: Path) -> None:
    """A hook: `memory()` before each of `steps`."""
    seen = []

    def look(_):
        seen.append(memory())
        result.write_text(json.dumps(seen))

    for step in steps:
        before_step(step, look)


def poison(where: str, steps: list[int], value: float) -> None:
    """A hook: `value` (nan or inf) in the input, weights, gradient or loss of some steps (from 0)."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * value

    def act(step: TrainStep) -> None:
        if where == "weights":
            with torch.no_grad():
                step.parameters[3].view(-1)[0] = value
            return
        objective, real = step.objective, step.objective.loss

        def loss(model, x0, t, eps, **cond):
            object.__setattr__(objective, "loss", real)
            result = real(model, x0 * value if where == "input" else x0, t, eps, **cond)
            return Backward.apply(result) if where == "gradient" else result * value if where == "loss" else result

        object.__setattr__(objective, "loss", loss)

    for step in steps:
        before_step(step, act)


def wait_for(condition: Callable[[], Any], timeout: float = 240.0) -> None:
    """Until `condition()` holds; AssertionError if it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s"
        time.sleep(0.005)


def after_update(index: int, value: float) -> None:
    """A hook: `value` in a weight after the step `index` (from 0)."""
    real = TrainStep.__call__

    def call(self, images, step, of=None):
        real(self, images, step, of)
        if step == index:
            with torch.no_grad():
                self.parameters[3].view(-1)[0] = value

    TrainStep.__call__ = call

import multiprocessing.connection
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from tests.configs import REPO, small_config
from tests.distributed import programs
from tests.reliability.conftest import promise  # noqa: F401
from tests.reliability.jobs import start


@dataclass
class Ended:
    """How the ranks of a run ended: exit codes as Popen has them (None: killed after the time), and their output."""

    codes: list[int | None]
    outputs: list[str]

    @property
    def errors(self) -> list[str]:
        """The lines that name a cause, of all ranks."""
        return [line for output in self.outputs for line in output.splitlines() if line.startswith("error:")]


def torchrun(*arguments: object) -> subprocess.Popen:
    """Two ranks as users start them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *map(str, arguments)], cwd=REPO, text=True, **pipes)


@pytest.fixture
def run_ranks(tmp_path, monkeypatch, repo):
    """Run ranks, of which no launcher ends the others, on a function of programs.py."""
    monkeypatch.chdir(repo)
    count = 0

    def run(program, *arguments, ranks=2, timeout=120.0) -> Ended:
        nonlocal count
        count += 1
        logs = [tmp_path / f"ranks-{count}-{rank}.txt" for rank in range(ranks)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        began = time.monotonic()
        processes = [
            start(programs.rank_main, rank, ranks, port, program, arguments, log=logs[rank]) for rank in range(ranks)
        ]
        codes: list[int | None] = [None] * ranks
        waiting = {process.sentinel: rank for rank, process in enumerate(processes)}
        while waiting and (left := began + timeout - time.monotonic()) > 0:
            for sentinel in multiprocessing.connection.wait(list(waiting), timeout=left):
                rank = waiting.pop(sentinel)
                processes[rank].join()
                codes[rank] = processes[rank].exitcode
        for rank in waiting.values():
            processes[rank].kill()
            processes[rank].join()
        return Ended(codes, [log.read_text() if log.exists() else "" for log in logs])

    return run


@pytest.fixture
def tiny_config(tmp_path):
    """As everywhere, but shorter, with two evaluations and a row for every step; as a dict."""
    changes = {"steps": 20, "log_every": 1, "save_every": 5, "eval_every": 10, "eval_steps": 3, "grid_samples": 10}

    def make(root: str = "working", **more) -> dict:
        return small_config(tmp_path, root, **changes | {"rank_timeout": 60.0} | more).to_dict()

    return make

"""kill -9 at random moments of a run that logs and saves all the time."""

import os
import select

import pytest

from fastdiff.runs import checkpoint
from fastdiff.runs.run import create_run, open_run
from tests.reliability import jobs
from tests.reliability.conftest import counts


@counts(fast=12, slow=200)
def test_nothing_acknowledged_is_lost(tmp_path, promise, count):
    with create_run(tmp_path, config={}) as run:
        path = run.path
    reader, writer = os.pipe()
    last = 0
    with promise("Crash while saving: whatever was acknowledged is there, and the run opens", "kill -9") as p:
        for index in range(count):
            random = jobs.random_source("kill", index)
            process = jobs.start(jobs.save_until_killed, path, _Inherited(writer), log=tmp_path / "log")
            assert select.select([reader], [], [], 240)[0], (tmp_path / "log").read_text()
            process.join(random.uniform(0, 0.05))  # nothing waits for this: it is the moment of the kill
            process.kill()
            process.join()
            last = max(last, *map(int, os.read(reader, 2**20).split()))
            with p.case(f"kill {index} after step {last}"):
                found = checkpoint.load_latest(path / "checkpoints")  # before anything is mended
                assert found is not None
                assert found.step >= last
                assert jobs.same_state(found.state, jobs.state(found.step))
                assert found.skipped == []
                with open_run(path) as run:
                    checkpoint.recover(run.checkpoints)
                    assert {p.name for p in run.checkpoints.iterdir()} == {
                        p.name for p in checkpoint.list_checkpoints(run.checkpoints)
                    }
                    steps = [row["step"] for row in run.train_rows()]
                    assert steps == list(range(1, len(steps) + 1))
                    assert len(steps) >= last
                assert checkpoint.load_latest(path / "checkpoints").step == found.step
    os.close(reader)
    os.close(writer)


class _Inherited(int):
    """A descriptor that a forked process is given."""

    def __reduce__(self):
        from multiprocessing.reduction import DupFd

        return _detach, (DupFd(int(self)),)


def _detach(duplicate) -> int:
    return duplicate.detach()


@pytest.mark.parametrize("name", [".config.json.123.tmp", "saves/.loss.png.123.tmp"])
def test_temporary_files_of_a_killed_run_go_at_the_next_start(tmp_path, name):
    with create_run(tmp_path, config={}) as run:
        path = run.path
    (path / name).write_bytes(b"half")
    open_run(path).close()
    assert not (path / name).exists()

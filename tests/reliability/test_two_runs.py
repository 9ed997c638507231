"""One run directory, one process."""

import json
import socket
import subprocess
import sys

from fastdiff.runs.run import create_run, open_run
from tests.reliability import jobs
from tests.reliability.conftest import counts


@counts(fast=8, slow=50)
def test_simultaneous_starts_have_one_holder(tmp_path, promise, count):
    with create_run(tmp_path, config={}) as run:
        path = run.path
    # Of a run that was killed on this host.
    (path / "lock").write_text(f"pid 999999999, host {socket.gethostname()}, since long ago\n")
    barrier = jobs._context.Barrier(count)
    results = [tmp_path / f"{i}.json" for i in range(count)]
    processes = [jobs.start(jobs.hold, path, barrier, result, log=tmp_path / "log") for result in results]
    jobs.wait_for(lambda: all(result.exists() for result in results))
    outcomes = [json.loads(result.read_text()) for result in results]
    holders = [outcome["pid"] for outcome in outcomes if outcome["error"] is None]
    with promise(
        "Two runs, one directory: one holder, the others exit within 2 s naming it", "simultaneous starts"
    ) as p:
        for outcome in outcomes:
            with p.case(outcome["pid"]):
                assert len(holders) == 1
                if outcome["error"] is not None:
                    assert outcome["seconds"] < 2
                    assert f"in use by another process (pid {holders[0]}, host " in outcome["error"]
    for process in processes:
        assert process.pid in holders or jobs.finish(process) == 1
    for process in processes:
        process.kill()
        process.join()
    open_run(path).close()  # free after kill -9


def test_a_second_start_is_refused_before_the_slow_imports(tmp_path, repo, tiny_config):
    """Importing torch takes longer than the 2 s in which the holder is to be named."""
    with create_run(tmp_path, config=tiny_config().to_dict()) as run:
        code = (
            "import sys, train_cifar\n"
            f"sys.argv[1:] = ['--resume', {str(run.path)!r}]\n"
            "status = train_cifar.run_command(train_cifar.main)\n"
            "assert 'torch' not in sys.modules\n"
            "sys.exit(status)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "in use by another process (pid" in done.stderr
    assert len(done.stderr.splitlines()) == 1

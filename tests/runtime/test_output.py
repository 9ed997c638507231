"""Processes whose output cannot be written; they import no torch, and so take a moment."""

import os
import subprocess
import sys

import pytest

TELLS = "print('ä', flush=True); print('more', file=sys.stderr); sys.stdout.write('left in the buffer')"
PUTS = "output.put('{\"value\": 1}')"


@pytest.fixture
def run(repo, monkeypatch):
    """Run code as a command; returns the exit code and what came on stderr."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")

    def run(code, **streams):
        whole = (
            "import sys, logging, warnings\n"
            "from fastdiff.cli import run_command; from fastdiff.runtime import output\n"
            f"def main(): {code}; return 7\n"
            "sys.exit(run_command(main))"
        )
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        done = subprocess.run([sys.executable, "-c", whole], cwd=repo, text=True, timeout=60, **streams)
        return done.returncode, done.stderr

    return run


@pytest.fixture(params=["pipe", "terminal", "disk"])
def dead(request):
    """A descriptor that fails with EPIPE, EIO or ENOSPC."""
    if request.param == "disk":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe() if request.param == "pipe" else os.openpty()
        os.close(reader)
    yield descriptor
    os.close(descriptor)


def test_what_only_tells_changes_no_exit_code(run, dead):
    assert run(TELLS, stdout=dead) == (7, "more\n")
    assert run(TELLS, stdout=dead, stderr=dead)[0] == 7
    assert run("warnings.warn('w'); logging.warning('l')", stderr=dead)[0] == 7


def test_closed_streams_are_no_files_of_the_run(run, tmp_path):
    """The first file that is opened must not become stdout or stderr."""
    file = tmp_path / "file"
    code = f"f = open({str(file)!r}, 'w'); import os; os.write(1, b'1'); os.write(2, b'2'); {TELLS}"
    assert run(code, preexec_fn=lambda: os.closerange(0, 3))[0] == 7
    assert file.read_bytes() == b""


def test_a_result_that_nobody_gets_is_a_failure_and_stands_in_the_message(run, dead):
    code, error = run(PUTS, stdout=dead)
    assert code == 1
    assert error.startswith("error: stdout cannot be written to (")
    assert error.endswith('; the result is {"value": 1}\n')
    assert run(PUTS, stdout=dead, stderr=dead)[0] == 1
    assert run(PUTS) == (7, "")


def test_a_loss_is_told_once_also_to_who_asks_later(run, tmp_path, dead):
    file = tmp_path / "log.txt"
    code = (
        f"print(1); s = output.losses_told_to(open({str(file)!r}, 'a', buffering=1).write); s.__enter__(); "
        "print(2); print(3); print(4, file=sys.stderr); print(5, file=sys.stderr); s.__exit__(None, None, None)"
    )
    assert run(code, stdout=dead, stderr=dead)[0] == 7
    text = file.read_text()
    assert text.count("stdout cannot be written to (") == text.count("stderr cannot be written to (") == 1


def test_a_character_that_the_locale_lacks_is_written_as_its_code(run, tmp_path):
    with (tmp_path / "out").open("w") as file:
        assert run("print('l\\u00e4ufe \\udcff')", stdout=file) == (7, "")
    assert (tmp_path / "out").read_text() == "l\\xe4ufe \\udcff\n"

"""What all commands have in common."""

import os
import subprocess
import sys

import pytest
import tyro

import train_cifar
from bench import compare, track
from fastdiff import cli
from profiles import capture

COMMANDS = {
    (train_cifar, ""): ("--data", "--data-root", "--run-root", "--resume"),
    (cli, "sample"): ("--checkpoint", "--out", "--save-npz"),
    (cli, "evaluate"): ("--checkpoint", "--data", "--data-root"),
    (cli, "likelihood"): ("--checkpoint", "--data", "--data-root"),
    (cli, "export"): ("--checkpoint", "--out"),
    (track, ""): ("--data", "--resume", "--plot"),
    (capture, "train"): ("--data", "--out"),
    (compare, "a.json"): ("b.json",),
}
EMPTY = [(*command, flag) for command, flags in COMMANDS.items() for flag in flags]


@pytest.mark.parametrize(("module", "command", "flag"), EMPTY, ids=lambda each: getattr(each, "__name__", each))
@pytest.mark.parametrize("form", [["{}", ""], ["{}", " \t"], ["{}="]], ids=["nothing", "blanks", "equals"])
def test_an_empty_value_is_no_default(monkeypatch, capsys, tmp_path, module, command, flag, form):
    monkeypatch.chdir(tmp_path)
    arguments = [part.format(flag) for part in form]
    if flag == "b.json":  # a name without a flag
        arguments = [arguments[-1].removeprefix("b.json=")]
    monkeypatch.setattr(sys, "argv", ["command", *([command] if command else []), *arguments])
    main = module.main if module is not compare else lambda: tyro.cli(compare.main)
    assert cli.run_command(main) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "is empty" in error
    assert flag in error or module is compare
    assert not os.listdir()


@pytest.mark.lab
@pytest.mark.parametrize("columns", ["1", "3", "10"])
def test_help_ends_however_narrow_the_terminal(repo, columns):
    for command in (["train_cifar.py"], ["-m", "fastdiff", "sample"]):
        environment = {**os.environ, "COLUMNS": columns}
        subprocess.run(
            [sys.executable, *command, "--help"], cwd=repo, env=environment, check=True, capture_output=True, timeout=60
        )

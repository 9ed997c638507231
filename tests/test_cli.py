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
from tests.configs import flags_of, small_config

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


@pytest.mark.parametrize(
    ("main", "arguments", "code", "said"),
    [
        (cli.main, ["sampel", "--checkpoint", "a"], 2, "there is no command 'sampel', only sample, evaluate,"),
        (train_cifar.main, ["--resume", "gone"], 1, "gone is no run directory: cannot read gone/config.json (No such"),
    ],
)
def test_what_is_not_there_is_one_line(monkeypatch, capsys, tmp_path, main, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    assert cli.run_command(main) == code
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert said in error


@pytest.mark.parametrize("parse", [train_cifar.parse, cli.train_autoencoder])
def test_help_lists_only_what_can_be_set(capsys, parse):
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "{fixed}" not in capsys.readouterr().out


@pytest.mark.lab
@pytest.mark.parametrize("columns", ["1", "3", "10"])
def test_help_ends_however_narrow_the_terminal(repo, columns):
    for command in (["train_cifar.py"], ["-m", "fastdiff", "sample"]):
        environment = {**os.environ, "COLUMNS": columns}
        subprocess.run(
            [sys.executable, *command, "--help"], cwd=repo, env=environment, check=True, capture_output=True, timeout=60
        )


SLOW_TO_IMPORT = {"torch._dynamo", "torch._inductor", "sklearn", "tensorboard", "matplotlib", "torchmetrics"}
SAMPLE = "sample --n 1 --steps 2 --checkpoint {run} --out grid.png"


@pytest.mark.lab
@pytest.mark.parametrize(
    ("command", "needless"),
    [
        ("--help", {"torch", "numpy"}),
        (SAMPLE, SLOW_TO_IMPORT),
        ("export --to safetensors --checkpoint {run} --out exported", SLOW_TO_IMPORT),
    ],
    ids=["help", "sample", "export"],
)
def test_a_command_imports_only_what_it_uses(repo, tmp_path, command, needless):
    """Imports are nearly all of the time that these take: torch itself, and what must not add as much again."""
    arguments = command.format(run=repo / "tests" / "reliability" / "format-1" / "run").split()
    code = (
        f"import sys, runpy\nsys.path.insert(0, {str(repo)!r})\nsys.argv = ['fastdiff', *{arguments}]\n"
        "try:\n    runpy.run_module('fastdiff', run_name='__main__')\n"
        f"except SystemExit as end:\n    assert not end.code\n    print(sorted({needless} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.lab
@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_training_without_compilation_does_not_import_the_compiler(repo, tmp_path, optimizer):
    """PyTorch's own optimizers would: a run of three steps took 22 s, and takes 14 s."""
    flags = [*flags_of(small_config(tmp_path, steps=2, optimizer=optimizer, save_every=2)), "--no-eval-at-start"]
    code = (
        f"import sys, runpy\nsys.argv = ['train_cifar.py', *{flags}]\n"
        "try:\n    runpy.run_path('train_cifar.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

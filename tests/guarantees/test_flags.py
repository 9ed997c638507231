"""Random flags, sensible and not: every command ends in 0, 1 or 2, says why, and leaves no half file."""

import io
import itertools
import os
import shutil
import subprocess
import sys
import traceback
import types
import typing
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import train_cifar
from bench import compare, machine, track
from bench.results import Results
from fastdiff import cli
from fastdiff import flags as flag_types
from fastdiff.config import SECTION_OF, SECTIONS, Config
from fastdiff.data import download
from fastdiff.reporting import pictures
from fastdiff.sections import PresetName
from fastdiff.training import train
from profiles import capture
from tests.configs import TINY, flags_of
from tests.reliability.conftest import counts
from tests.reliability.jobs import random_source

CONFIG = Config.of(
    data="images.npz", data_root="data", net=TINY, timesteps=20, batch_size=4, warmup_steps=1, steps=2, device="cpu",
    log_every=1, save_every=1, eval_every=2, features="none", eval_samples=2, eval_batch_size=2, eval_steps=2,
    grid_samples=2,
)  # fmt: skip
HINTS = {section: typing.get_type_hints(type(getattr(Config(), section))) for section in SECTIONS}
TRAIN = {name: HINTS[section][name] for name, section in SECTION_OF.items()} | {"preset": PresetName, "resume": Path}
SMALL = ("--n", "2", "--steps", "2", "--batch-size", "2", "--device", "cpu")
FEATURES = ("--features", "efficientnet_lite0", "--feature-size", "32")

# command -> script, entry, what makes it small, and its flags
COMMANDS = {
    "train": (["train_cifar.py"], train_cifar.main, flags_of(CONFIG), TRAIN),
    "track": (
        ["bench/track.py"], track.main, [*flags_of(CONFIG), *FEATURES], {**TRAIN, "every": int | None, "plot": Path},
    ),
    "capture": (
        ["profiles/capture.py"], capture.main, ["train", *flags_of(CONFIG), "--profile", "1", "--out", "new"],
        {**TRAIN, "out": Path},
    ),
    "compare": (["bench/compare.py"], lambda: tyro.cli(compare.main), [], {"a": Path, "b": Path, "tolerance": float}),
}  # fmt: skip
for name, small in {
    "sample": SMALL, "evaluate": [*SMALL, *FEATURES], "likelihood": SMALL, "export": ["--out", "new"]
}.items():  # fmt: skip
    flags = typing.get_type_hints(flag_types.COMMANDS[name])
    COMMANDS[name] = (["-m", "fastdiff"], cli.main, [name, "--checkpoint", "run", *small], flags)

# Values that mean so much work that a user must have meant it.
WORK = {
    "steps", "n", "probes", "eval_steps", "eval_samples", "final_eval_samples", "grid_samples", "blocks_per_level",
    "profile",
}  # fmt: skip
INTEGERS = ["0", "1", "2", "3", "4", "8", "-1", "007"]
HUGE = ["1000000000000", "99999999999999999999"]
FLOATS = ["0", "1", "0.5", "0.999", "-1", "1e-320", "1e308", "nan", "inf", "-inf"]
JUNK = [[], [""], [" "], ["1", "2"], ["\udcff"], ["1e3"], ["0x10"], ["x"], ["None"], ["nonsense"]]
PATHS = [
    "images.npz", "folder", "empty", "file", "run", "run/checkpoints/step-2", "a.json", "missing", "missing/a/b", "new",
    "new.png", "new.jpg", "file/x", "/proc/new", "device", "läufe", "\udcff", "a b",
    "x" * 300, "x\n", "~", "~nobody/x", ".", "run/config.json", "digits", "cifar10", "damaged.zip", "damaged.npz",
]  # fmt: skip
OPTIONS = ["order=2", "eta=1", "S_churn=nan", "order", "=", "snr=", "variance=fixed-small", "corrector_steps=-1", "x=1"]
STRAY = [["--help"], ["-h"], ["--"], ["stray"], ["--nonsense", "1"], ["--steps"], ["-x"], [""], [" "], ["--data="]]


def value(random, name, hint):
    """Some words for a flag of this type."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in parts if part is not type(None))
        parts = typing.get_args(hint)
    if random.random() < 0.05:
        return random.choice(JUNK)
    if typing.get_origin(hint) is typing.Literal:
        return [random.choice(parts)]
    if typing.get_origin(hint) is tuple:
        return random.choices(OPTIONS if str in parts else INTEGERS, k=random.randint(0, 3))
    if hint is int:
        return [random.choice(INTEGERS if name in WORK else INTEGERS + HUGE)]
    return [random.choice(FLOATS if hint is float else PATHS)]


def draw(random, flags):
    """A few flags, each with anything as its value."""
    words, names = [], random.sample(sorted(flags), min(len(flags), random.choice([1, 1, 1, 2, 2, 3, 5])))
    if random.random() < 0.5:
        names.append(
            random.choice([name for name, hint in flags.items() if hint in (str, Path, str | None, Path | None)])
        )
    for name in names:
        flag = "--" + (name if random.random() < 0.1 else name.replace("_", "-"))
        if flags[name] is bool:
            words += [random.choice([flag, flag.replace("--", "--no-", 1)])]
            continue
        found = value(random, name, flags[name])
        if name in ("a", "b"):  # that have no flag
            words += found
        else:
            words += [f"{flag}={found[0]}"] if len(found) == 1 and random.random() < 0.3 else [flag, *found]
    if random.random() < 0.05:
        words += random.choice(STRAY)
    return words


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with data, a trained run, and things that are neither."""
    folder = tmp_path_factory.mktemp("template")
    here = os.getcwd()
    os.chdir(folder)
    try:
        images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
        np.savez("images.npz", images=images)
        for name in ("folder", "empty", "data"):
            os.mkdir(name)
        for i, image in enumerate(images):
            pictures.save_grid(image[None], Path(f"folder/{i}.png"))
        Path("file").write_text("text")
        os.symlink("/dev/null", "device")  # a link, so that a command that replaces it does no harm
        for name in ("damaged.zip", "damaged.npz"):
            Path(name).write_bytes(b"PK\x03\x04 no more")
        for name in ("a.json", "b.json"):
            Results({"device": "cpu"}, {"bytes_s": 1.0, "flops_s": 1.0}, []).write(Path(name))
        assert train.train(CONFIG) == 0
        os.rename("working/1", "run")
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def cheap(monkeypatch):
    """No network, no compiler, no curves, and no measurement of the machine."""

    def no_network(*_):
        raise OSError("no network")

    monkeypatch.setattr(download, "_blocks", no_network)
    monkeypatch.setattr(torch, "compile", lambda net, **_: net)
    monkeypatch.setattr(train, "plot", lambda *arguments: None)
    monkeypatch.setattr(pictures, "save_labelled", lambda *_: None)
    monkeypatch.setattr(machine, "ceilings_apart", lambda *_, **__: {"bytes_s": 1e9, "flops_s": 1e12})


def here(entry, words, monkeypatch):
    """Exit code, stdout and stderr of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *words])
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.run_command(entry)
        except SystemExit as error:
            code = error.code
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise AssertionError(f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})") from error
    return code, *(stream.flush() or stream.buffer.getvalue().decode() for stream in (out, err))


def apart(script, words, repo):
    """The same of a process of its own."""
    command = [sys.executable, *(str(repo / part) if part.endswith(".py") else part for part in script), *words]
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run([os.fsencode(c) for c in command], env=environment, capture_output=True, timeout=300)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


@counts(fast=3, slow=200)
def test_any_flags(count, template, cheap, tmp_path, repo, promise, monkeypatch):
    with promise(
        "Flags: any of them end any command in 0, 1 or 2, without a traceback or half a file", "commands"
    ) as p:
        for index, (command, (script, entry, small, flags)) in itertools.product(range(count), COMMANDS.items()):
            words = draw(random_source("flags", command, index), flags)
            folder = shutil.copytree(template, tmp_path / f"{command}-{index}", symlinks=True)
            monkeypatch.chdir(folder)
            monkeypatch.setenv("HOME", str(folder))
            with p.case(f"{command} {words}"):
                if index % 40 == 39:
                    code, out, err = apart(script, [*small, *words], repo)
                else:
                    code, out, err = here(entry, [*small, *words], monkeypatch)
                assert code in (0, 1, 2), err[-500:]
                assert "Traceback" not in out + err, err[-500:]
                assert code == 0 or err or command == "compare", "nothing said"
                left = [f.name for f in folder.rglob(".*") if f.suffix in (".tmp", ".part") or ".saving-" in f.name]
                assert not left
            monkeypatch.chdir(tmp_path)
            shutil.rmtree(folder)

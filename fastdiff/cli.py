"""`python -m fastdiff {sample,evaluate,likelihood,export,show,autoencoder}`, installed `fastdiff`."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from itertools import pairwise
from pathlib import Path

import tyro

from fastdiff.config import Config
from fastdiff.errors import TrainingFailed, UsageError, UserError
from fastdiff.flags import COMMANDS, Autoencoder
from fastdiff.presets import PRESETS
from fastdiff.runs.run import open_run
from fastdiff.runtime import output

HELP = (tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed)  # flags without their sections, and only what can be set
NARROWEST = 20  # columns in which --help is set; in 3 it would never end
MEMORY = re.compile("out of memory|allocate|Storage size")  # how PyTorch and NumPy say that it does not suffice
OTHER_RANKS_WAIT = 5.0  # seconds in which another rank tells the mistake that all have found: torchrun ends all by one


def other_rank() -> bool:
    """Whether torchrun has started this process beside the one that tells this host's users of their mistakes."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


@contextmanager
def told_once() -> Generator[None]:
    """Only the first rank of a host shows what the block prints; the others wait a moment before they exit."""
    if not other_rank():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        except SystemExit:
            time.sleep(OTHER_RANKS_WAIT)
            raise


def run_command(command: Callable[[], int]) -> int:
    """Run a command; a mistake or a failed run becomes one line on stderr and the exit code 1, or 2 for a bad flag."""
    output.spare()
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)

    def checked() -> int:
        _refuse_blanks(sys.argv[1:])
        return command()

    try:
        return _recorded(checked)() if "TORCHELASTIC_ERROR_FILE" in os.environ else checked()
    except Exception as error:
        message = _told(error)
        if message is None:
            raise
        if not (other_rank() and isinstance(error, UserError)):
            print(f"error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _recorded(command: Callable[[], int]) -> Callable[[], int]:
    """The command, whose failure torchrun's summary tells: by the line for the user, or by the traceback of a bug."""
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

    class Handler(ErrorHandler):
        def record_exception(self, e: BaseException) -> None:
            if other_rank() and isinstance(e, UserError):
                time.sleep(OTHER_RANKS_WAIT)
            message = _told(e)
            if message is None:
                super().record_exception(e)
            else:  # torchrun shows it where there is no "py_callstack"
                summary = {"message": f"error: {message}", "extraInfo": {"timestamp": str(int(time.time()))}}
                with suppress(OSError):  # a full disk must not hide the cause
                    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": summary}))

    recorded = record(command, Handler())
    return lambda: recorded() or 0  # None: SystemExit(0), as of --help


def _told(error: BaseException) -> str | None:
    """One line on what the user or the machine did wrong; None for a fault of ours."""
    if isinstance(error, UserError | TrainingFailed):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError | RuntimeError) and MEMORY.search(str(error)):
        reason = " ".join(str(error).split("\n")[0].split())
        return (
            f"not enough memory ({reason}); lower --batch-size, --eval-batch-size or --timesteps, or raise --accumulate"
        )
    return None


def _refuse_blanks(arguments: list[str]) -> None:
    """No flag means anything by an empty value, least of all its default or the current folder."""
    for before, argument in pairwise(["an argument", *arguments]):
        flag, equals, value = argument.partition("=") if argument.startswith("--") else (before, "=", argument)
        if equals and not value.strip():
            raise UsageError(f"{flag} is empty ({value!r}), perhaps by a variable that is not set; give a value.")


def defaults(arguments: list[str], preset: str = "ddpm-cifar10") -> Config:
    """The config of --preset, or of the run that --resume names, over which the other flags of a training go."""
    given = {name: value for name, value in pairwise(arguments) if name in ("--preset", "--resume")}
    given |= dict(a.split("=", 1) for a in arguments if a.startswith(("--preset=", "--resume=")))
    if "--resume" in given:
        path = Path(given["--resume"]) / "config.json"
        try:
            values = json.loads(path.read_bytes())
            if not isinstance(values, dict):
                raise ValueError(f"it holds a {type(values).__name__}, not fields")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"--resume {given['--resume']} is no run directory: cannot read {path} ({reason}); name one such as "
                "working/1."
            ) from error
        return Config.from_dict(values)
    return PRESETS.get(given.get("--preset", preset), PRESETS[preset])


def train_autoencoder(arguments: list[str]) -> int:
    """Parse the flags of `python -m fastdiff autoencoder`, train, and return the exit code."""
    with told_once():
        config, prog = defaults(arguments, "autoencoder"), f"{_prog()} autoencoder"
        flags = tyro.cli(Autoencoder, default=Autoencoder.of(config), args=arguments, prog=prog, config=HELP)
        config = flags.over(config)
        if config.autoencoder.factor == 0:
            raise UsageError(
                "--factor is 0, as of a diffusion network, which you train by `python train_cifar.py`; name a preset "
                "or a run of an autoencoder, or give --factor 2, 4, 8 or 16."
            )
    return start_training(config, flags.resume)


def start_training(config: Config, resume: Path | None) -> int:
    """Train, and return the exit code."""
    # torch takes seconds to import, which --help need not wait for, nor who names a run that is in use.
    run = open_run(resume) if resume is not None and os.environ.get("RANK", "0") == "0" else None
    from fastdiff.training.train import train

    return train(config, resume=run)


def _prog() -> str:
    return "fastdiff" if Path(sys.argv[0]).name == "fastdiff" else "python -m fastdiff"


def main(arguments: list[str] | None = None) -> int:
    """Parse `python -m fastdiff ...` and run the command; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["autoencoder"]:
        return train_autoencoder(given[1:])
    names = [*COMMANDS, "autoencoder"]
    if given and not given[0].startswith("-") and given[0] not in names:
        raise UsageError(
            f"there is no command {given[0]!r}, only {', '.join(names)}; networks are trained by `python "
            "train_cifar.py`, installed `fastdiff-train`."
        )
    flags = tyro.extras.subcommand_cli_from_dict(
        {**COMMANDS, "autoencoder": Autoencoder},
        description="Use what a training run has saved, or train an autoencoder. Networks are trained by "
        "`python train_cifar.py`, installed: `fastdiff-train`.",
        prog=_prog(),
        args=arguments,
    )
    from fastdiff.evaluation import commands  # torch takes seconds to import, which --help need not wait for

    name = next(name for name, kind in COMMANDS.items() if kind is type(flags))
    getattr(commands, name)(flags)
    return 0

"""Train: `python train_cifar.py [--preset NAME] [--any-config-field VALUE ...] [--resume RUN_DIR]`."""

import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tyro

from fastdiff.cli import run_command
from fastdiff.config import PRESETS, Config
from fastdiff.errors import UserError


@dataclass(frozen=True)
class Flags:
    """Train a diffusion model on CIFAR-10-sized images."""

    config: Config
    resume: Path | None = None
    """Continue this run (e.g. working/1) from its newest checkpoint; its own config is the default of every flag."""


def parse(arguments: list[str]) -> Flags:
    """Flags over the defaults of --preset, or of the run that --resume names."""
    given = {name: value for name, value in pairwise(arguments) if name in ("--preset", "--resume")}
    given |= dict(a.split("=", 1) for a in arguments if a.startswith(("--preset=", "--resume=")))
    default = PRESETS.get(given.get("--preset", ""), Config())
    if "--resume" in given:
        path = Path(given["--resume"]) / "config.json"
        try:
            default = Config.from_dict(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"--resume {given['--resume']} is no run directory: cannot read {path} ({error})."
            ) from error
    return tyro.cli(Flags, default=Flags(default), args=arguments, config=(tyro.conf.OmitArgPrefixes,))


def main() -> int:
    """Parse, train, and return the exit code."""
    flags = parse(sys.argv[1:])
    from fastdiff.training.train import train  # torch takes seconds to import, which --help need not wait for

    return train(flags.config, resume=flags.resume)


if __name__ == "__main__":
    sys.exit(run_command(main))

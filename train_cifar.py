"""Train: `python train_cifar.py [--preset NAME] [--any-config-field VALUE ...] [--resume RUN_DIR]`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastdiff.cli import HELP, defaults, run_command, start_training, told_once
from fastdiff.config import Config
from fastdiff.errors import UsageError


@dataclass(frozen=True)
class Flags:
    """Train a diffusion model on CIFAR-10-sized images."""

    config: Config
    resume: Path | None = None
    """Continue this run (e.g. working/1) from its newest checkpoint; its own config is the default of every flag."""


def parse(arguments: list[str]) -> Flags:
    """All flags of the command."""
    return tyro.cli(Flags, default=Flags(defaults(arguments)), args=arguments, config=HELP)


def main() -> int:
    """Parse, train, and return the exit code."""
    with told_once():
        flags = parse(sys.argv[1:])
        if flags.config.autoencoder.factor:
            raise UsageError("--preset or --resume names an autoencoder; train it by `python -m fastdiff autoencoder`.")
    return start_training(flags.config, flags.resume)


def run() -> int:
    """The command `fastdiff-train` of an installed fastdiff."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(run())

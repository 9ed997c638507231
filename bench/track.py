"""Train, and write the throughput beside the Frechet distance: `python bench/track.py [--preset NAME] [--every N] ...`.

Every flag of train_cifar.py passes through. After each evaluation the run directory holds one more line in track.jsonl
and an up-to-date track.png; `--resume RUN_DIR` goes on, and `--plot RUN_DIR` makes both anew from any run.
"""

import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # `kernels` must be this repository's

# ruff: noqa: E402
import tyro

from fastdiff.cli import run_command
from fastdiff.errors import UserError
from fastdiff.words import counted
from train_cifar import Flags, defaults

# torch takes seconds to import, which --help and a mistyped flag need not wait for: the functions import what they use.

Row = dict[str, Any]


@dataclass(frozen=True)
class TrackFlags(Flags):
    """Train a diffusion model, and write its throughput beside the Frechet distance of its samples."""

    every: int | None = None
    """Steps between evaluations, each a row; by default --eval-every (10,000 in ddpm-cifar10)."""
    plot: Path | None = None
    """Train nothing: make track.jsonl and track.png of this run directory anew from its metrics."""


@dataclass(frozen=True)
class Now:
    """What this process knows beyond a run's metrics, for the rows that it adds.

    Args:
        flops: of training on one image, forward and backward; 2 a multiply-add.
        ceiling: FLOP a second of the machine's own matrix product.
        memory: what was measured, and its peak in bytes.
    """

    flops: int
    ceiling: float
    memory: tuple[str, int]


def track_rows(train_rows: list[Row], eval_rows: list[Row], known: list[Row], now: Now | None) -> list[Row]:
    """A row for each evaluation of a run.

    step, images            trained on so far
    images_per_second       in training alone, since the evaluation before; None where no step was logged in between
    step_ms                 the same as milliseconds
    share_of_ceiling        of training's FLOP a second, of `ceiling_flops`; None where that was not measured
    <metric>                the distance, under the name that `metric` gives (`fid`, `fd_...`); with how it was made
    memory_peak_bytes       of the process so far, and what was measured (`memory_of`); None where it was not measured
    seconds_evaluating      of this evaluation
    seconds_total           of training and all evaluations so far

    Args:
        train_rows, eval_rows: of the run's metrics, in their order.
        known: rows of an earlier call, whose measurements are kept.
        now: for the last evaluation, if it is not among them.
    """
    kept = {_key(row): row for row in known}
    rows: list[Row] = []
    evaluating = 0.0
    train_rows = [row for row in train_rows if row["step"]]  # before the first there is no time
    speed: float | None = None
    begun = 0  # training rows that belong to earlier evaluations
    for e in eval_rows:
        evaluating += e["seconds"]
        ended = sum(row["step"] <= e["step"] for row in train_rows)
        if ended > begun:
            speed, steps, images = _speed(train_rows, begun, ended)
            begun = ended
        training = train_rows[ended - 1]["seconds"] if ended else 0.0
        row: Row = {
            "step": e["step"],
            "images": e["images"],
            "images_per_second": speed,
            "step_ms": None if speed is None else 1e3 * images / steps / speed,
            "share_of_ceiling": None,
            "ceiling_flops": None,
            "metric": e["metric"],
            e["metric"]: e["value"],
            **{name: e.get(name) for name in ("samples", "sampler", "sampler_steps", "feature_size", "reference")},
            "memory_peak_bytes": None,
            "memory_of": None,
            "seconds_evaluating": e["seconds"],
            "seconds_total": training + evaluating,
        }
        if _key(row) in kept:
            measured = ("share_of_ceiling", "ceiling_flops", "memory_peak_bytes", "memory_of")
            row |= {name: kept[_key(row)][name] for name in measured}
        elif now is not None and e is eval_rows[-1]:
            row |= {"ceiling_flops": now.ceiling, "memory_of": now.memory[0], "memory_peak_bytes": now.memory[1]}
            if speed is not None:
                row["share_of_ceiling"] = speed * now.flops / now.ceiling
        rows.append(row)
    return rows


def _speed(rows: list[Row], begun: int, ended: int) -> tuple[float, int, int]:
    """Images a second in rows[begun:ended], the steps and the images since the row before.

    Each row's own rate counts for its images: the first steps of a process, which compile, are in no row's time.
    """
    before = rows[begun - 1] if begun else {"step": 0, "images": 0}
    images = [row["images"] - earlier["images"] for earlier, row in pairwise([before, *rows[begun:ended]])]
    seconds = sum(n / row["images_per_second"] for n, row in zip(images, rows[begun:ended], strict=True))
    return sum(images) / seconds, rows[ended - 1]["step"] - before["step"], sum(images)


def _key(row: Row) -> tuple:
    """What tells evaluations apart; one that was made again after a crash has another duration."""
    names = ("step", "metric", "samples", "sampler", "sampler_steps", "feature_size", "seconds_evaluating")
    return tuple(row[name] for name in names)


def write(run: Any, now: Now | None) -> int:
    """Bring track.jsonl and track.png of an open `fastdiff.runs.run.Run` up to date; returns the rows."""
    from fastdiff.reporting.plots import plot_track
    from fastdiff.runs.files import write_atomically

    path = run.path / "track.jsonl"
    try:
        known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        rows = track_rows(run.train_rows(), run.eval_rows(), known, now)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and repeat with --plot {run.path}.") from error
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    plot_track(rows, run.path / "track.png")
    return len(rows)


def plot(directory: Path) -> int:
    """`--plot`: returns 0. Raises UserError for a folder that is no run, or a run without evaluations."""
    from fastdiff.runs.run import open_run

    with open_run(directory) as run:
        rows = write(run, None)
    if rows == 0:
        raise UserError(f"--plot {directory} has no evaluation yet; there is nothing to draw.")
    print(f"wrote {directory / 'track.jsonl'} ({counted(rows, 'row')}) and {directory / 'track.png'}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = tyro.cli(
        TrackFlags, default=TrackFlags(defaults(arguments)), args=arguments, prog="python bench/track.py",
        config=(tyro.conf.OmitArgPrefixes,),
    )  # fmt: skip
    if flags.plot is not None:
        return plot(flags.plot)
    config = flags.config if flags.every is None else flags.config.replace(eval_every=flags.every)
    if config.eval.features == "none":
        raise UserError("--features none leaves nothing to track; choose an extractor, or train with train_cifar.py.")

    from bench.machine import ceilings_apart
    from bench.suite import network_flops
    from fastdiff.runs.run import Run
    from fastdiff.runtime.device import memory_peak, resolve_device
    from fastdiff.training.train import train

    device = resolve_device(config.machine.device)
    ceiling = ceilings_apart(device, budget=4)["flops_s"]
    _, flops = network_flops(config.net)
    print(f"{'ceiling':<10} {ceiling / 1e12:.4g} TFLOP/s, {flops / 1e9:.4g} GFLOP to train on an image")

    def after_evaluation(run: Run) -> None:
        write(run, Now(flops, ceiling, memory_peak(device)))

    return train(config, resume=flags.resume, after_evaluation=after_evaluation)


if __name__ == "__main__":
    sys.exit(run_command(main))

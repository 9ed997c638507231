"""The training run: reads the whole config, builds what stands around the trainer, and lets it loop.

data -> step(objective, model) -> optimizer + EMA -> checkpoint, metrics, evaluation
"""

import json
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from fastdiff.config import RESUMABLE_CHANGES, Config
from fastdiff.data.cache import cache_folder
from fastdiff.data.datasets import ImageSet
from fastdiff.data.loaders import check_loader
from fastdiff.errors import UsageError, UserError
from fastdiff.evaluation.features import FeatureExtractor, make_extractor
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.reporting.progress import TrainingProgress
from fastdiff.runs import checkpoint
from fastdiff.runs.data import load_run_data
from fastdiff.runs.run import Run, create_run, open_run, write_atomically
from fastdiff.runs.weights import initial_weights
from fastdiff.runtime import output
from fastdiff.runtime.device import check_triton, resolve_compile, resolve_kernels, resolve_loader, set_backends
from fastdiff.runtime.signals import Stopped, StopRequest
from fastdiff.runtime.world import Ranks
from fastdiff.training.trainer import Trainer

OWN_FLAGS = ("device", "data", "data_root")  # which may differ from rank to rank; the content of data is compared
SIGNAL_GRACE = 3.0  # seconds in which torchrun's copy of a signal, and a scheduler's own, count as one


def train(
    config: Config, *, resume: Path | Run | None = None, after_evaluation: Callable[[Run], object] = lambda run: None
) -> int:
    """Train as the config says; the entry point of `train_cifar.py`.

    Under torchrun, every rank calls it. An exception in one rank must end its process, with which the others end.

    Args:
        config: the whole run.
        resume: a run directory to continue, from its newest checkpoint that verifies; or that run, open already. Only
            rank 0's counts.
        after_evaluation: called with the run, on rank 0, when the row of an evaluation has been written.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        UserError: bad input, before anything is written.
        TrainingFailed: the loss or a gradient was not finite, the last step could not be saved, or another rank failed.
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(Ranks.launched(config.device, timeout=config.rank_timeout))
        parts = ranks.size * config.accumulate
        if config.batch_size % parts:
            raise UsageError(
                f"--batch-size is {config.batch_size}, but must be a multiple of {parts}: {ranks.size} ranks share it, "
                f"and --accumulate is {config.accumulate}."
            )
        device = ranks.device
        check_triton(resolve_kernels(config.kernels, device), resolve_compile(config.compile, device), device)
        set_backends(device, deterministic=config.deterministic)
        flags = {f"--{name.replace('_', '-')}": value for name, value in config.flat().items() if name not in OWN_FLAGS}
        flags["--flip"] = config.flips  # which `auto` takes from the name of the data
        ranks.check_equal(**flags, torch=torch.__version__)
        run, saved = None, None
        if resume is not None and ranks.is_main:
            run = stack.enter_context(resume if isinstance(resume, Run) else open_run(resume))
            checkpoint.recover(run.checkpoints)
            saved = _find_checkpoint(config, run.path)
        saved = ranks.share(saved, "the checkpoint")
        initial = initial_weights(config) if resume is None and ranks.is_main else None
        initial = ranks.share(initial, "the initial weights")
        with ranks.first_on_host("loading the data"):
            image_set, data = load_run_data(config, saved.state if saved is not None else {})
        ranks.check_equal(**{"--data": image_set.sha256})
        distance = _make_distance(config, image_set, ranks) if config.features != "none" else None
        check_loader(resolve_loader(config.loader, ranks.device))
        if run is None and ranks.is_main:  # only now, so that bad input leaves no run directory
            run = stack.enter_context(create_run(config.run_root, config=config.to_dict()))
        if run is not None:
            stack.enter_context(output.losses_told_to(run.note))
        stop = stack.enter_context(StopRequest(quiet=not ranks.is_main, grace=SIGNAL_GRACE if ranks.size > 1 else 0.0))
        ranks.limit_waits()
        console = None if ranks.is_main else Console(quiet=True, force_terminal=False)
        progress = stack.enter_context(TrainingProgress(config.steps, console))
        trainer = Trainer(
            config, ranks=ranks, image_set=image_set, data=data, distance=distance, run=run, progress=progress,
            stop=stop, resumed=saved, initial=initial, after_evaluation=after_evaluation,
        )  # fmt: skip
        if run is not None and run.config != json.loads(config.to_json()):
            write_atomically(run.path / "config.json", config.to_json().encode())
        try:
            trainer.loop()
        except Stopped:
            number = ranks.any(stop.signal or 0)  # which of them some ranks have yet to hear
            if run is not None:
                end = f"stopped by {signal.Signals(number).name} at step {trainer.step:,}"
                run.note(end)
                progress.print(f"{end}; resume with: {_command()} --resume {run.path}")
            return 128 + number
        if run is not None:
            run.note(f"done at step {trainer.step:,}")
            progress.print(
                f"done: look at {run.saves}/ (samples, curves), {run.path / 'metrics.csv'} and {run.checkpoints}/"
            )
        return stop.exit_code  # not 0 where a signal came in the last moment


def _command() -> str:
    """What a user types to train: an installed fastdiff has a command of its own."""
    name = Path(sys.argv[0]).name
    return name if name == "fastdiff-train" else "python train_cifar.py"


def _make_distance(config: Config, image_set: ImageSet, ranks: Ranks) -> FrechetDistance:
    """The distance to the training images; all ranks take the extractor that `auto` is on rank 0."""

    def make(features: str) -> FeatureExtractor:
        return make_extractor(features, device=ranks.device, size=config.feature_size)

    extractor = make(config.features) if ranks.is_main else None
    name = ranks.share(extractor.name if extractor is not None else "", "the extractor")
    return FrechetDistance(
        extractor or make(name), image_set, cache_dir=cache_folder(config.data_root), device=ranks.device,
        reference=ranks.is_main,
    )  # fmt: skip


def _find_checkpoint(config: Config, resume: Path) -> checkpoint.Checkpoint:
    """The newest good checkpoint of a run, whose config may differ from `config` only where that does no harm."""
    saved = checkpoint.load_latest(resume / "checkpoints")
    if saved is None:
        raise UserError(
            f"--resume {resume} has no checkpoint to continue from (it was stopped before --save-every "
            f"{config.save_every} steps); start a new run."
        )
    for path, reason in saved.skipped:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    changes = config.changes(Config.from_dict(saved.state["config"]))
    if changes:
        listed = "; ".join(
            f"--{name.replace('_', '-')} was {old!r}, now {new!r}" for name, (old, new) in changes.items()
        )
        raise UserError(
            f"--resume {resume} cannot change what is trained: {listed}. Drop these flags, or start a new run; "
            f"free to change are {', '.join(sorted(RESUMABLE_CHANGES))}."
        )
    return saved

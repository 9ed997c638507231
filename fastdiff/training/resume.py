"""From where a run goes on, and what it may not change then."""

import sys
from pathlib import Path

from fastdiff.config import RESUMABLE_CHANGES, Config
from fastdiff.errors import UserError
from fastdiff.runs import checkpoint
from fastdiff.training.optim import LearningRate


def find_checkpoint(config: Config, resume: Path) -> checkpoint.Checkpoint:
    """The newest good checkpoint of a run, whose config may differ from `config` only where that does no harm.

    Raises:
        UserError: there is none, or the config would change what is trained.
    """
    saved = checkpoint.load_latest(resume / "checkpoints")
    if saved is None:
        raise UserError(
            f"--resume {resume} has no checkpoint to continue from (it ended before --save-every "
            f"{config.run.save_every} steps); start a new run."
        )
    for path, reason in saved.skipped:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    before = Config.from_dict(saved.state["config"])
    changes = config.changes(before)
    if changes:
        listed = "; ".join(
            f"--{name.replace('_', '-')} was {old!r}, now {new!r}" for name, (old, new) in changes.items()
        )
        raise UserError(
            f"--resume {resume} cannot change what is trained: {listed}. Drop these flags, or start a new run; "
            f"free to change are {', '.join(sorted(RESUMABLE_CHANGES))}."
        )
    _check_learning_rate(LearningRate.of(before), LearningRate.of(config), saved.step, resume)
    return saved


def _check_learning_rate(before: LearningRate, now: LearningRate, steps: int, resume: Path) -> None:
    """Raises UserError if one of the steps made would have had another learning rate.

    So a decay can branch off a constant run, and be moved until it begins.
    """
    if now.agrees(before, steps):
        return
    begun = before.decay_start is not None and before.decay_start < steps
    advice = (
        "Keep --lr-decay, --steps and --decay-fraction as they were"
        if begun
        else f"Choose --lr-decay, --steps and --decay-fraction so that it falls from step {steps:,} or later"
    )
    raise UserError(
        f"--resume {resume} has made {steps:,} steps by a learning rate that is {before}, and cannot go on by one that "
        f"is {now}: steps already made would have been others. {advice}, or start a new run."
    )

"""From where a run goes on, and what it may not change then."""

import sys
from pathlib import Path

from fastdiff.config import RESUMABLE_CHANGES, Config
from fastdiff.errors import UserError
from fastdiff.runs import checkpoint
from fastdiff.training.optim import LearningRate
from fastdiff.words import counted


def find_checkpoint(config: Config, resume: Path) -> checkpoint.Checkpoint:
    """The newest good checkpoint of a run, whose config may differ from `config` only where that does no harm.

    Raises:
        UserError: there is none, or the config would change what is trained.
    """
    saved = checkpoint.load_latest(resume / "checkpoints")
    if saved is None:
        raise UserError(
            f"--resume {resume} has no checkpoint to continue from (it ended before step "
            f"{config.run.save_every:,}, the first by --save-every); start a new run."
        )
    for path, reason in saved.skipped:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    before = Config.from_dict(saved.state["config"])
    if changes := config.changes(before):
        listed = "; ".join(f"{_flag(name)} was {old!r}, now {new!r}" for name, (old, new) in changes.items())
        raise UserError(
            f"--resume {resume} cannot change what is trained: {listed}. Drop these flags, or start a new run; "
            f"free to change are {', '.join(map(_flag, sorted(RESUMABLE_CHANGES)))}."
        )
    then, now = LearningRate.of(before), LearningRate.of(config)
    if not now.agrees(then, saved.step):  # a decay can branch off a constant run, and be moved until it begins
        begun = then.decay_start is not None and then.decay_start < saved.step
        advice = (
            "Keep --lr-decay, --steps and --decay-fraction as they were"
            if begun
            else f"Choose --lr-decay, --steps and --decay-fraction so that it falls from step {saved.step:,} or later"
        )
        raise UserError(
            f"--resume {resume} has made {counted(saved.step, 'step')} by a learning rate that is {then}, and cannot "
            f"go on by one that is {now}: steps already made would have been others. {advice}, or start a new run."
        )
    return saved


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

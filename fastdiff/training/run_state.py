"""What a checkpoint of a run holds, and how a trainer goes on from it."""

from typing import TYPE_CHECKING, Any

from fastdiff.runs import checkpoint

if TYPE_CHECKING:
    from fastdiff.training.trainer import Trainer


def collect(trainer: "Trainer") -> dict[str, Any]:
    """All that the run will need to go on as if it had not been stopped, for `checkpoint.save`."""
    return {
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.state_dict(),
        "optimizer": trainer.update.state_dict(),
        "metrics": trainer.train_step.metrics_state(),
        "noise_levels": trainer.train_step.noise_levels.state_dict(),
        "noise_history": trainer.noise_history,
        "seconds": trainer.seconds,
        "last_log": trainer.last_log,
        "loss_history": trainer.loss_history,
        "fid_history": trainer.fid_history,
        "best": trainer.best,
        "evaluated": trainer.evaluated,
        **trainer.data,
        "config": trainer.config.to_dict(),
    }


def restore(trainer: "Trainer", saved: checkpoint.Checkpoint) -> None:
    """The inverse of `collect`; metrics rows that the checkpoint does not count are dropped."""
    state = saved.state
    trainer.model.load_state_dict(state["model"])
    trainer.ema.load_state_dict(state["ema"], updates=saved.step)
    trainer.update.load_state_dict(state["optimizer"])
    trainer.train_step.load_metrics_state(state["metrics"])
    if "noise_levels" in state:  # which runs of the first version have not counted
        trainer.train_step.noise_levels.load_state_dict(state["noise_levels"])
        trainer.noise_history = state["noise_history"]
    trainer.step, trainer.seconds, trainer.last_log = saved.step, state["seconds"], tuple(state["last_log"])
    trainer.loss_history, trainer.fid_history = state["loss_history"], state["fid_history"]
    trainer.best, trainer.evaluated = state["best"], state["evaluated"]

    def unfinished(row: dict[str, Any]) -> bool:
        """Rows of the checkpoint's own step that it does not count: a last partial mean, a later evaluation."""
        if row["kind"] == "train":
            return row["step"] == saved.step and trainer.last_log[0] != saved.step
        return row["step"] == saved.step and trainer.evaluated != saved.step

    if trainer.ranks.is_main:
        trainer.run.truncate(saved.step, drop=unfinished)

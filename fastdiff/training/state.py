"""What a run is at a step: all that a checkpoint holds, and how a run goes on from it."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastdiff.config import Config
from fastdiff.training.ema import EMA
from fastdiff.training.metrics import Metrics, NoiseLevels
from fastdiff.training.optim import Update

# Rows of these sampling settings compare; others do not.
COMPARABLE = (
    "metric", "samples", "sampler", "sampler_steps", "feature_size", "reference", "labels", "guidance",
    "guidance_interval",
)  # fmt: skip


class RunState:
    """The parts that have a `state_dict` of their own, and the run's counters and histories.

    step           updates made
    seconds        of training, without compilation, evaluations and saves
    last_log       step and seconds of the last whole row
    loss_history   (step, loss) of every whole row
    fid_history    the rows of the evaluations
    noise_history  the loss by noise level, since the row before
    best           the evaluation with the smallest distance
    evaluated      the last step that was evaluated
    least_error    the smallest denoising error of a run for few steps
    alarmed        whether it was said to have risen
    """

    COUNTERS = (
        "seconds", "last_log", "loss_history", "fid_history", "noise_history", "best", "evaluated", "least_error",
        "alarmed",
    )  # fmt: skip

    def __init__(
        self, config: Config, data: Mapping[str, Any], model: nn.Module, ema: EMA, update: Update,
        metrics: Metrics, noise_levels: NoiseLevels,
    ) -> None:  # fmt: skip
        self.config, self.data = config, data
        self.model, self.ema, self.update = model, ema, update
        self.metrics, self.noise_levels = metrics, noise_levels
        self.step, self.seconds, self.last_log = 0, 0.0, (0, 0.0)
        self.loss_history: list[tuple[int, float]] = []
        self.fid_history: list[dict[str, Any]] = []
        self.noise_history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.evaluated: int | None = None
        self.least_error: float | None = None
        self.alarmed = False

    @property
    def images(self) -> int:
        """Training images seen so far."""
        return self.step * self.config.optim.batch_size

    def state_dict(self) -> dict[str, Any]:
        """What `checkpoint.save` writes. Waits for the device."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.update.state_dict(),
            "metrics": self.metrics.state_dict(),
            "noise_levels": self.noise_levels.state_dict(),
            **{name: getattr(self, name) for name in self.COUNTERS},
            **self.data,
            "config": self.config.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, step: int) -> None:
        """Go on after `step` updates, as if the run had not been stopped."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"], updates=step)
        self.update.load_state_dict(state["optimizer"])
        self.metrics.load_state_dict(state["metrics"])
        if "noise_levels" in state:  # the first checkpoints have none
            self.noise_levels.load_state_dict(state["noise_levels"])
        for name in self.COUNTERS:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.step, self.last_log = step, tuple(state["last_log"])

    def counts(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the metrics' file belongs to this state: not a partial mean, nor a later evaluation."""
        last = self.last_log[0] if row["kind"] == "train" else self.evaluated
        return row["step"] < self.step or last == self.step

    def add_evaluation(self, row: dict[str, Any]) -> None:
        """Note an evaluation, and whether it is the best of those that were made alike; one made for the end is not."""
        self.fid_history.append(row)
        how = {name: row[name] for name in COMPARABLE if name in row}
        best = self.best if self.best is not None and self.best.items() >= how.items() else None
        settings = self.config.eval
        most = self.data["data_images"] if self.config.autoencoder.factor else math.inf  # each is rebuilt once
        usual = min(settings.eval_samples, most)
        for_the_end = row["samples"] == min(settings.final_eval_samples or usual, most) != usual
        if for_the_end and self.best is not None:
            return
        if self.step and (best is None or row["value"] < best["value"]):
            self.best = {"step": self.step, "value": row["value"], **how}

"""The weights' update: clip the gradient, take the optimizer's step, move the average; and the learning rate.

`OPTIMIZERS` has a row for each optimizer, with an implementation by PyTorch's kernels and one by ours. All have one
interface. `weights` are the tensors that the network computes with, by name; gradients are with respect to them.

    begin(lr=...)             the host's part: count it, and write what changes from step to step to the device
    add(gradients, ...)       take the gradient of the batch, or of one part of it after another
    reduce(sum_)              with several ranks: add up their gradients
    apply(grad_clip=...)      clip, step, average; returns the gradient's norm as a device tensor

Everything except `begin` is CUDA-graph safe. An optimizer's implementations save the same state, so that a run may go
on with another one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from fastdiff.config import Config
from fastdiff.training.ema import EMA
from fastdiff.training.flat import FlatUpdate
from fastdiff.training.fused_adam import FusedAdam
from fastdiff.training.groups import Settings
from fastdiff.training.radam import RAdam
from fastdiff.training.torch_adam import TorchAdam


@dataclass(frozen=True)
class LearningRate:
    """A linear rise to `peak` over the warm-up, then `peak`, then, if it ever falls, a linear fall to 0.

    Calling it with a step, counted from 0, gives the rate of that update. Update `decay_start` is the last at `peak`;
    the fall would reach 0 at update `steps`, the first that is not made.
    """

    peak: float
    warmup_steps: int = 0
    decay_start: int | None = None
    steps: int | None = None

    @classmethod
    def of(cls, config: Config) -> "LearningRate":
        """What --lr, --warmup-steps, --lr-decay, --steps and --decay-fraction say."""
        optim, steps = config.optim, config.run.steps
        start = optim.decay_start(steps)
        return cls(optim.lr, optim.warmup_steps, start, None if start is None else steps)

    def __call__(self, step: int) -> float:
        rate = self.peak * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.peak
        if self.decay_start is None or self.steps is None or step < self.decay_start:
            return rate
        return rate * max(0, self.steps - step) / (self.steps - self.decay_start)

    def agrees(self, other: "LearningRate", steps: int) -> bool:
        """Whether the first `steps` updates have the rates of `other`, whose rise is the same."""
        return self == other or all(each.decay_start is None or each.decay_start >= steps for each in (self, other))

    def __str__(self) -> str:
        if self.decay_start is None:
            return "constant"
        return f"falling from step {self.decay_start:,} to 0 at step {self.steps:,}"


Update = TorchAdam | FlatUpdate

OPTIMIZERS: dict[str, dict[str, Callable[[nn.Module, EMA, Settings], Update]]] = {
    "adam": {"torch": TorchAdam, "triton": FusedAdam},
    "radam": {"torch": partial(RAdam, fused=False), "triton": partial(RAdam, fused=True)},
}


def make_update(kernels: str, model: nn.Module, ema: EMA, *, optimizer: str = "adam", **settings: Any) -> Update:
    """The update of a network's weights; parameters of the network and of its average may move into flat buffers.

    Args:
        kernels: "triton": ours (on a CPU their PyTorch references); "torch": PyTorch's own.
        optimizer: a key of OPTIMIZERS.
        **settings: the fields of Settings.
    """
    return OPTIMIZERS[optimizer][kernels](model, ema, Settings(**settings))

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
from functools import partial
from typing import Any

from torch import nn

from fastdiff.training.ema import EMA
from fastdiff.training.flat import FlatUpdate
from fastdiff.training.fused_adam import FusedAdam
from fastdiff.training.groups import Settings
from fastdiff.training.radam import RAdam
from fastdiff.training.torch_adam import TorchAdam


def learning_rate(step: int, *, peak: float, warmup_steps: int) -> float:
    """Rate of the step-th update, counted from 0: a linear rise to `peak` over the warm-up, then constant."""
    return peak * min(1.0, (step + 1) / warmup_steps) if warmup_steps else peak


Update = TorchAdam | FlatUpdate

OPTIMIZERS: dict[str, dict[str, Callable[[nn.Module, EMA, Settings], Update]]] = {
    "adam": {"torch": TorchAdam, "triton": FusedAdam},
    "radam": {"torch": partial(RAdam, fused=False), "triton": partial(RAdam, fused=True)},
}


def make_update(kernels: str, model: nn.Module, ema: EMA, *, optimizer: str = "adam", **settings: Any) -> Update:
    """The update of a network's weights.

    Args:
        kernels: "triton": ours (on a CPU their PyTorch references); "torch": PyTorch's own.
        model: the network, whose parameters may move into flat buffers.
        ema: its average, likewise.
        optimizer: a key of OPTIMIZERS.
        **settings: the fields of Settings.
    """
    return OPTIMIZERS[optimizer][kernels](model, ema, Settings(**settings))

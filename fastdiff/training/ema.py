"""Exponential moving average of a network's weights, which is what samples are drawn from."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """ema <- decay * ema + (1 - decay) * weights after each step, in float32 (float64 for a float64 model).

    A bf16 average would not move: at decay 0.9999 the increments are below its rounding. Buffers are copied, never
    averaged. With warm-up the n-th update uses min(decay, (1 + n) / (10 + n)), so that early averages forget the
    initial weights (the rule of TensorFlow's ExponentialMovingAverage).

    Args:
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor.is_floating_point() and tensor.dtype != torch.float64:
                tensor.data = tensor.data.float()
        self._averages: list[Tensor] = list(self.model.parameters())
        self._weights: list[Tensor] = list(model.parameters())
        self._buffers, self._source_buffers = list(self.model.buffers()), list(model.buffers())

    def next_decay(self) -> float:
        """Count one more update, and return its decay."""
        self.updates += 1
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    def update(self) -> None:
        """Take the model's current weights into the average; a few launches, whatever the number of parameters."""
        self.blend(self.next_decay())

    @torch.no_grad()
    def blend(self, decay: float | Tensor, keep: Tensor | None = None) -> None:
        """average <- average + (1 - decay) (weights - average); for a decay on the device, 0-dim, in three passes.

        With `keep`, bool 0-dim, the average stays as it is where that is false.
        """
        if keep is not None and (keep.is_cuda or not keep):
            decay = 1.0 - keep.double() * (1.0 - decay)
        weights = [w.to(a.dtype) for w, a in zip(self._weights, self._averages, strict=True)]
        if isinstance(decay, Tensor):  # which foreach_lerp_ would read on the host
            change = torch._foreach_sub(weights, self._averages)
            torch._foreach_mul_(change, (1 - decay).to(change[0].dtype))
            torch._foreach_add_(self._averages, change)
        else:
            torch._foreach_lerp_(self._averages, weights, weight=1.0 - decay)
        self.copy_buffers()

    def copy_buffers(self) -> None:
        """Take over the model's buffers as they are."""
        for mine, theirs in zip(self._buffers, self._source_buffers, strict=True):
            mine.copy_(theirs)

    def set_buffers(self, **values: Tensor) -> None:
        """Write the model's own buffers, of these names, and the average's."""
        for (name, mine), theirs in zip(self.model.named_buffers(), self._source_buffers, strict=True):
            if name in values:
                mine.copy_(values[name])
                theirs.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights and the buffers, under the model's own names."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any], *, updates: int) -> None:
        """Continue from saved averages after `updates` updates."""
        self.model.load_state_dict(state)
        self.updates = updates

    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into a model of the same shape, in its own dtype."""
        model.load_state_dict(self.model.state_dict())

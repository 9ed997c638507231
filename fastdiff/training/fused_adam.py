"""Clip factor, AdamW, average and the bf16 copies of the weights by our kernel, in one pass over flat buffers."""

from functools import partial

import torch
from torch import Tensor, nn

from fastdiff import _kernels as kernels
from fastdiff.training.ema import EMA
from fastdiff.training.flat import FlatUpdate
from fastdiff.training.groups import Settings, without_dynamo


class FusedAdam(FlatUpdate):
    """AdamW by `kernels.adam_ema_`; see FlatUpdate."""

    def __init__(self, model: nn.Module, ema: EMA, settings: Settings) -> None:
        make = partial(without_dynamo(torch.optim.AdamW), fused=True, **settings.options)
        super().__init__(model, ema, settings, make)
        self.step = torch.zeros_like(self.decay)  # one count for all
        for flat in self.flats:
            moments = {name: torch.zeros_like(flat.parameter) for name in ("exp_avg", "exp_avg_sq")}
            flat.state = {"step": self.step, **moments}

    def step_(self, clip: Tensor, good: Tensor) -> None:
        """Everything in one launch a buffer."""
        self.step += good
        clip = torch.where(good, clip, 0.0)  # at which the kernel writes nothing
        for flat in self.flats:
            kernels.adam_ema_(
                flat.parameter, flat.total, flat.state["exp_avg"], flat.state["exp_avg_sq"], flat.average, flat.half,
                step=self.step, lr=flat.lr, decay=self.decay, clip=clip, beta2=self.beta2,
                weight_decay=self.weight_decay,
            )  # fmt: skip

"""RAdam (Liu et al. 2020) by PyTorch, on flat buffers."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fastdiff import _kernels as kernels
from fastdiff.training.ema import EMA
from fastdiff.training.flat import FlatUpdate
from fastdiff.training.groups import Settings, without_dynamo


class RAdam(FlatUpdate):
    """torch.optim.RAdam with decoupled weight decay. It works by elements, so each buffer is one parameter to it.

    Args:
        fused: average by `kernels.ema_update_`, and compute with bf16 copies of the weights.
    """

    rate_dtype = torch.float32  # as of the numbers that PyTorch multiplies by it in place

    def __init__(self, model: nn.Module, ema: EMA, settings: Settings, *, fused: bool) -> None:
        kind = without_dynamo(torch.optim.RAdam)
        make = partial(kind, decoupled_weight_decay=True, **settings.options)
        super().__init__(model, ema, settings if fused else replace(settings, half=()), make)
        self.fused, self.on_device = fused, self.decay.is_cuda
        groups = [{"params": [flat.parameter], "lr": flat.lr} for flat in self.flats]
        self.radam = make(groups, capturable=self.on_device)
        # PyTorch would warn that the first steps run uncaptured, which is by design.
        setattr(self.radam, "_warned_capturable_if_run_uncaptured", True)  # noqa: B010
        for flat in self.flats:  # now, as the first update may have to be passed over
            moments = {name: torch.zeros_like(flat.parameter) for name in ("exp_avg", "exp_avg_sq")}
            flat.state = {"step": torch.zeros((), device=flat.parameter.device), **moments}
            self.radam.state[flat.parameter] = flat.state

    def step_(self, clip: Tensor, good: Tensor) -> None:
        """A step of RAdam, put back where it was not good; then the average and the copies."""
        for flat, group in zip(self.flats, self.radam.param_groups, strict=True):
            flat.parameter.grad = flat.total.float() * clip
            group["lr"] = flat.lr if self.on_device else flat.lr.item()
        kept = [tensor for flat in self.flats for tensor in (flat.parameter, *flat.state.values())]
        before = [tensor.clone() for tensor in kept]
        self.radam.step()
        for now, old in zip(kept, before, strict=True):
            now.copy_(torch.where(good, now, old))
        if not self.fused:
            self.ema.blend(self.decay, good)
            return
        decay = torch.where(good, self.decay, 1.0)
        for flat in self.flats:
            kernels.ema_update_(flat.average, flat.parameter, decay)
            if flat.half is not None:
                flat.half.copy_(flat.parameter)

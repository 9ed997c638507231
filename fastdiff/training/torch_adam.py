"""Clip, AdamW and average by PyTorch's own kernels, parameter by parameter."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastdiff.training.ema import EMA
from fastdiff.training.groups import Settings, finite, pack, parameter_groups, unpack, without_dynamo


class TorchAdam:
    """AdamW (Loshchilov & Hutter 2019), which is Adam (Kingma & Ba 2015) at weight_decay 0.

    Args:
        settings: with `graphs` a GPU reads learning rate and decay from its own memory. With it or `skip_nonfinite`,
            updates that are not finite are passed over; on a GPU this turns the average's one pass into three.
    """

    def __init__(self, model: nn.Module, ema: EMA, settings: Settings) -> None:
        self.ema, self.guarded = ema, settings.graphs or settings.skip_nonfinite
        self.weights: dict[str, Tensor] = dict(model.named_parameters())
        self.parameters = list(model.parameters())
        self.make = partial(without_dynamo(torch.optim.AdamW), fused=True, **settings.options)
        self.adam = self.make(parameter_groups(model))
        device = self.parameters[0].device
        self.decay: float | Tensor = 0.0
        self.on_device = settings.graphs and device.type == "cuda"
        if self.on_device:
            self.decay = torch.zeros((), dtype=torch.float64, device=device)
            for group in self.adam.param_groups:
                group["lr"] = torch.zeros((), device=device)  # float32, as fused Adam reads it

    def begin(self, *, lr: float) -> None:
        """The host's part of the next update."""
        decay = self.ema.next_decay()
        for group in self.adam.param_groups:
            rate = lr * group["lr_scale"]
            group["lr"] = group["lr"].fill_(rate) if self.on_device else rate
        self.decay = self.decay.fill_(decay) if isinstance(self.decay, Tensor) else decay

    def add(self, gradients: Sequence[Tensor], *, share: float = 1.0, first: bool = True) -> None:
        """Take the gradient of the part of the batch that is `share` of it; `first` forgets the parts before."""
        if not first:
            sums = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_add_(sums, list(gradients), alpha=share)
            return
        if share != 1.0:
            gradients = torch._foreach_mul(list(gradients), share)
        for p, gradient in zip(self.parameters, gradients, strict=True):
            # Fused Adam walks both by memory order, so the gradient must be laid out as the weight is.
            p.grad = gradient if gradient.stride() == p.stride() else torch.empty_like(p).copy_(gradient)

    @torch.no_grad()
    def reduce(self, sum_: Callable[[list[Tensor]], object]) -> None:
        """Have `sum_` replace the gradient, as one float32 vector (n,), by its sum over the ranks."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        sum_([flat])
        parts = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])

    def apply(self, *, grad_clip: float, good: Tensor | None = None) -> Tensor:
        """Update weights and averages; returns the global gradient norm before clipping, 0-dim.

        With `skip_nonfinite` or `graphs` nothing changes where the norm is not finite, or `good`, bool 0-dim, is false:
        the device itself passes over the update.
        """
        with record_function("optimizer"):
            norm = nn.utils.clip_grad_norm_(self.parameters, grad_clip, foreach=True)
            good = finite(norm, good) if self.guarded else None
            if good is not None:
                # As torch.amp's GradScaler does: at 1, fused Adam leaves weights, moments and its count alone.
                setattr(self.adam, "found_inf", (~good).float())  # noqa: B010
            for group in self.adam.param_groups:
                # Fused Adam is capturable as it is; it only wants to be told.
                group["capturable"] = self.on_device and torch.cuda.is_current_stream_capturing()
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)
        with record_function("ema"):
            self.ema.blend(self.decay, good)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state."""
        return pack(self.make, self.parameters, self.adam.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of any implementation of Adam; every tensor stays in its place."""
        for p, loaded in unpack(self.make, self.parameters, state).items():
            for name, value in loaded.items():
                self.adam.state[p].setdefault(name, value).copy_(value)

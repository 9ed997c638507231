"""Flat buffers: all parameters in a few 1-D tensors, so that an update takes a few launches, whatever their number."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastdiff.training.ema import EMA
from fastdiff.training.groups import Make, Settings, finite, pack, parameter_groups, unpack

ALIGNMENT = 64  # elements: every weight starts on a 128-byte boundary also in bf16, as tensor-core kernels want


class Flat:
    """Buffers for some of the parameters, and the views of them that stand for each parameter.

    parameter, average   (n,) float32
    half                 (n,) bfloat16 copy of parameter, or None
    gradient             (n,) bfloat16 with half, else float32
    total                (n,) what the update takes: gradient, or the float32 sum of several
    state                what the optimizer keeps, by PyTorch's names: (n,) for each element, 0-dim for all
    leaves               what the network computes with: views of half, or the parameters
    order                where each of the parameters stands among all of the model's
    lr                   0-dim: the learning rate of its group
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        averages: dict[nn.Parameter, nn.Parameter],
        *,
        order: list[int],
        bf16: bool,
        accumulate: bool,
        lr: Tensor,
    ) -> None:
        self.parameters, self.order, self.lr = parameters, order, lr
        aligned = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        *self.offsets, n = itertools.accumulate(aligned, initial=0)
        device = parameters[0].device
        self.parameter, self.average = (torch.zeros(n, device=device) for _ in range(2))
        self.gradient = torch.zeros(n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        self.total = torch.zeros(n, device=device) if accumulate else self.gradient
        self.half = torch.zeros_like(self.gradient) if bf16 else None
        self.state: dict[str, Tensor] = {}

        self.gradients = self.views(self.gradient)
        for buffer, tensors in ((self.parameter, parameters), (self.average, [averages[p] for p in parameters])):
            for tensor, view in zip(tensors, self.views(buffer), strict=True):
                view.copy_(tensor.detach())
                tensor.data = view
        self.leaves: list[Tensor] = list(parameters)
        if self.half is not None:
            self.half.copy_(self.parameter)
            self.leaves = [view.requires_grad_() for view in self.views(self.half)]

    def views(self, buffer: Tensor) -> list[Tensor]:
        """A view for each parameter, in its shape and memory format."""
        return [
            torch.as_strided(buffer, p.shape, p.stride(), offset)
            for p, offset in zip(self.parameters, self.offsets, strict=True)
        ]


class FlatUpdate(ABC):
    """What optimizers on flat buffers share; `step_` is their own.

    The network computes with bf16 copies of some parameters instead of having autocast cast every weight anew in every
    step; the masters stay float32. The model's and the average's parameters become views of the flat buffers, under
    their old names, shapes and memory formats.

    Args:
        settings: an update that is not finite is always passed over, and can always be captured.
        make: PyTorch's optimizer of the same mathematics, in whose layout the state is saved.
    """

    rate_dtype = torch.float64

    def __init__(self, model: nn.Module, ema: EMA, settings: Settings, make: Make) -> None:
        self.ema, self.make = ema, make
        self.weight_decay, self.beta2, self.accumulate = settings.weight_decay, settings.beta2, settings.accumulate
        self.parameters = list(model.parameters())
        place = {p: i for i, p in enumerate(self.parameters)}
        averages = dict(zip(self.parameters, ema.model.parameters(), strict=True))
        device, cast = self.parameters[0].device, set(settings.half)
        # Device tensors, so that a captured graph would see each step's values.
        self.decay = torch.zeros((), dtype=torch.float64, device=device)
        self.rates: list[tuple[Tensor, float]] = []  # one of each group, and its factor
        self.flats: list[Flat] = []
        for group in parameter_groups(model):
            lr = torch.zeros((), dtype=self.rate_dtype, device=device)
            self.rates.append((lr, group["lr_scale"]))
            for bf16 in (True, False):
                parameters = [p for p in group["params"] if (p in cast) == bf16]
                if parameters:
                    order = [place[p] for p in parameters]
                    flat = Flat(parameters, averages, order=order, bf16=bf16, accumulate=self.accumulate, lr=lr)
                    self.flats.append(flat)

        leaves = {p: leaf for flat in self.flats for p, leaf in zip(flat.parameters, flat.leaves, strict=True)}
        self.weights: dict[str, Tensor] = {name: leaves[p] for name, p in model.named_parameters()}

    @abstractmethod
    def step_(self, clip: Tensor, good: Tensor) -> None:
        """One step of the optimizer and the average on every buffer, unless `good`, bool 0-dim, is false.

        Args:
            clip: 0-dim, float32: the gradient's factor.
        """

    def begin(self, *, lr: float) -> None:
        """The host's part of the next update."""
        for rate, scale in self.rates:
            rate.fill_(lr * scale)
        self.decay.fill_(self.ema.next_decay())

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor], *, share: float = 1.0, first: bool = True) -> None:
        """Take the gradient of the part of the batch that is `share` of it; `first` forgets the parts before."""
        if not self.accumulate and not (first and share == 1.0):
            raise ValueError("a gradient in parts needs an update made with accumulate=True")
        for flat in self.flats:
            torch._foreach_copy_(flat.gradients, [gradients[i] for i in flat.order])
            if self.accumulate:
                if first:
                    flat.total.zero_()
                flat.total.add_(flat.gradient, alpha=share)

    def reduce(self, sum_: Callable[[list[Tensor]], object]) -> None:
        """Have `sum_` replace the gradient, one float32 vector a buffer, by its sum over the ranks."""
        sum_([flat.total for flat in self.flats])

    @torch.no_grad()
    def apply(self, *, grad_clip: float, good: Tensor | None = None) -> Tensor:
        """Update weights, averages and bf16 copies; returns the global gradient norm before clipping, 0-dim.

        Where the norm is not finite, or `good`, bool 0-dim, is false, nothing changes: the device itself passes over
        the update.
        """
        with record_function("optimizer"):
            norms = [torch.linalg.vector_norm(flat.total, dtype=torch.float32) for flat in self.flats]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            good = finite(norm, good)
            self.step_((grad_clip / (norm + 1e-6)).clamp(max=1.0), good)  # the factor of clip_grad_norm_
            self.ema.copy_buffers()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The state as PyTorch's optimizer saves it, per parameter; the elements' as views."""
        state = {}
        for flat in self.flats:
            views = {name: flat.views(buffer) for name, buffer in flat.state.items() if buffer.ndim}
            counts = {name: value for name, value in flat.state.items() if not value.ndim}
            for i, p in enumerate(flat.parameters):
                own = {name: value.to(torch.float32, copy=True) for name, value in counts.items()}
                state[p] = own | {name: each[i] for name, each in views.items()}
        return pack(self.make, self.parameters, state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from any implementation's state, and from the parameters as they are now; all stays in its place."""
        loaded, zero = unpack(self.make, self.parameters, state), torch.zeros(())
        for flat in self.flats:
            for name, buffer in flat.state.items():
                places = flat.views(buffer) if buffer.ndim else [buffer] * len(flat.parameters)
                for p, place in zip(flat.parameters, places, strict=True):
                    place.copy_(loaded[p].get(name, zero))
            if flat.half is not None:
                flat.half.copy_(flat.parameter)

"""The weights' update: clip the gradient, Adam, moving average; and the learning rate.

Two implementations with one interface. `weights` are the tensors that the network computes with, by name, of which
the gradient is taken. An update is

    begin(lr=...)             the host's part: count it, and write what changes from step to step to the device
    add(gradients, ...)       take the gradient of the batch, or of one part of it after another
    reduce(sum_)              with several ranks: add up their gradients
    apply(grad_clip=...)      clip, Adam, average; returns the gradient's norm as a device tensor

of which all but `begin` can be captured in a CUDA graph. Saved states are interchangeable: both are that of
torch.optim.AdamW. Loading one keeps every tensor in its place.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastdiff import _kernels as kernels
from fastdiff.training.ema import EMA

ALIGNMENT = 64  # elements: every weight starts on a 128-byte boundary also in bf16, as tensor-core kernels want


def learning_rate(step: int, *, peak: float, warmup_steps: int) -> float:
    """Rate of the step-th update, counted from 0: a linear rise to `peak` over the warm-up, then constant."""
    return peak * min(1.0, (step + 1) / warmup_steps) if warmup_steps else peak


class TorchUpdate:
    """By PyTorch: AdamW (Loshchilov & Hutter 2019), which is Adam (Kingma & Ba 2015) at weight_decay 0, and EMA.

    Args:
        model: its parameters are updated in place.
        ema: follows them.
        graphs: whether it has to be capturable, so that a GPU reads learning rate and decay from its own memory.
        skip_nonfinite: whether to pass over an update whose gradient's norm is not finite; with `graphs` it always
            does. On a GPU this turns the average's one pass into three.
    """

    def __init__(
        self, model: nn.Module, ema: EMA, *, weight_decay: float, graphs: bool = False, skip_nonfinite: bool = False
    ) -> None:
        self.ema, self.weight_decay, self.guarded = ema, weight_decay, graphs or skip_nonfinite
        self.weights: dict[str, Tensor] = dict(model.named_parameters())
        self.parameters = list(model.parameters())
        self.adam = _adamw(self.parameters, weight_decay)
        device = self.parameters[0].device
        self.lr: float | Tensor = 0.0
        self.decay: float | Tensor = 0.0
        if graphs and device.type == "cuda":
            self.lr = torch.zeros((), device=device)  # float32, as fused Adam reads it
            self.decay = torch.zeros((), dtype=torch.float64, device=device)

    def begin(self, *, lr: float) -> None:
        """The host's part of the next update."""
        decay = self.ema.next_decay()
        if isinstance(self.lr, Tensor) and isinstance(self.decay, Tensor):
            self.lr.fill_(lr)
            self.decay.fill_(decay)
        else:
            self.lr, self.decay = lr, decay

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
            good = _finite(norm, good) if self.guarded else None
            if good is not None:
                # As torch.amp's GradScaler does: at 1, fused Adam leaves weights, moments and its count alone.
                setattr(self.adam, "found_inf", (~good).float())  # noqa: B010
            group = self.adam.param_groups[0]
            group["lr"] = self.lr
            # Fused Adam is capturable as it is; it only wants to be told.
            group["capturable"] = isinstance(self.lr, Tensor) and torch.cuda.is_current_stream_capturing()
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)
        with record_function("ema"):
            self.ema.blend(self.decay, good)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state."""
        state = self.adam.state_dict()
        for group in state["param_groups"]:
            group |= {"lr": 0.0, "capturable": False}  # every step sets its own
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from either implementation's state."""
        loaded = _adamw(self.parameters, self.weight_decay)
        loaded.load_state_dict(state)
        for p in self.parameters:
            mine = self.adam.state[p]
            for name, value in loaded.state[p].items():
                if name in mine:
                    mine[name].copy_(value)
                else:
                    mine[name] = value


class FusedUpdate:
    """By our kernel: clip factor, AdamW, EMA and the bf16 copies of the weights in one pass over flat buffers.

    The network computes with bf16 copies of some parameters, which the pass itself writes, instead of having autocast
    cast every weight anew in every step; the masters stay float32. The model's and the
    average's parameters become views of the flat buffers, under their old names, shapes
    and memory formats.

    Args:
        model: its parameters move into a flat buffer.
        ema: its parameters too.
        half: parameters to keep bf16 copies of.
        accumulate: whether the gradient may come in parts (of a batch, or of ranks), whose sum is then kept in float32:
            in bf16 a part is lost where the sum is 256 times as large.
    """

    def __init__(
        self, model: nn.Module, ema: EMA, *, weight_decay: float, half: Collection[nn.Parameter] = (),
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        self.ema, self.weight_decay, self.accumulate = ema, weight_decay, accumulate
        self.parameters = list(model.parameters())
        averages = dict(zip(self.parameters, ema.model.parameters(), strict=True))
        cast = set(half)
        groups = ([p for p in self.parameters if p in cast], [p for p in self.parameters if p not in cast])
        self.flats = [_Flat(group, averages, bf16=group[0] in cast, accumulate=accumulate) for group in groups if group]

        leaves = {p: leaf for flat in self.flats for p, leaf in zip(flat.parameters, flat.leaves, strict=True)}
        self.weights: dict[str, Tensor] = {name: leaves[p] for name, p in model.named_parameters()}
        place = {p: i for i, p in enumerate(self.parameters)}
        for flat in self.flats:
            flat.order = [place[p] for p in flat.parameters]
        device = self.parameters[0].device
        # Device tensors, so that a captured graph would see each step's values.
        self.step, self.lr, self.decay = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))

    def begin(self, *, lr: float) -> None:
        """The host's part of the next update."""
        self.lr.fill_(lr)
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
        """Have `sum_` replace the gradient, one or two float32 vectors, by its sum over the ranks."""
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
            good = _finite(norm, good)
            self.step += good
            clip = (grad_clip / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
            clip = torch.where(good, clip, 0.0)  # at which the kernel writes nothing
            for flat in self.flats:
                kernels.adam_ema_(
                    flat.parameter, flat.total, flat.exp_avg, flat.exp_avg_sq, flat.average, flat.half,
                    step=self.step, lr=self.lr, decay=self.decay, clip=clip, weight_decay=self.weight_decay,
                )  # fmt: skip
            self.ema.copy_buffers()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, the moments as views."""
        moments = {p: m for flat in self.flats for p, m in zip(flat.parameters, flat.moments, strict=True)}
        adam = _adamw(self.parameters, self.weight_decay)
        for p in self.parameters:
            exp_avg, exp_avg_sq = moments[p]
            adam.state[p] = {"step": self.step.float(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from either implementation's state, and from the parameters as they are now."""
        adam = _adamw(self.parameters, self.weight_decay)
        adam.load_state_dict(state)
        for flat in self.flats:
            for p, (exp_avg, exp_avg_sq) in zip(flat.parameters, flat.moments, strict=True):
                self.step.copy_(adam.state[p]["step"])
                exp_avg.copy_(adam.state[p]["exp_avg"])
                exp_avg_sq.copy_(adam.state[p]["exp_avg_sq"])
            if flat.half is not None:
                flat.half.copy_(flat.parameter)


class _Flat:
    """Flat buffers for some of the parameters, and the views of them that stand for each parameter.

    parameter, average, exp_avg, exp_avg_sq   (n,) float32
    half                                      (n,) bfloat16, or None
    gradient                                  (n,) bfloat16 with half, else float32
    total                                     (n,) what the update takes: gradient, or the float32 sum of several
    order                                     where each of the parameters stands among all of the model's
    leaves                                    what the network computes with: views of half, or the parameters
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        averages: dict[nn.Parameter, nn.Parameter],
        *,
        bf16: bool,
        accumulate: bool,
    ) -> None:
        self.parameters = parameters
        self.order: list[int] = []
        self.offsets, n = [], 0
        for p in parameters:
            self.offsets.append(n)
            n += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        device = parameters[0].device
        self.parameter, self.average, self.exp_avg, self.exp_avg_sq = (torch.zeros(n, device=device) for _ in range(4))
        self.gradient = torch.zeros(n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        self.total = torch.zeros(n, device=device) if accumulate else self.gradient
        self.half = torch.zeros_like(self.gradient) if bf16 else None

        self.gradients = self._views(self.gradient)
        self.moments = list(zip(self._views(self.exp_avg), self._views(self.exp_avg_sq), strict=True))
        for buffer, tensors in ((self.parameter, parameters), (self.average, [averages[p] for p in parameters])):
            for tensor, view in zip(tensors, self._views(buffer), strict=True):
                view.copy_(tensor.detach())
                tensor.data = view
        self.leaves: list[Tensor] = list(parameters)
        if self.half is not None:
            self.half.copy_(self.parameter)
            self.leaves = [view.requires_grad_() for view in self._views(self.half)]

    def _views(self, buffer: Tensor) -> list[Tensor]:
        """A view for each parameter, in its shape and memory format."""
        return [
            torch.as_strided(buffer, p.shape, p.stride(), offset)
            for p, offset in zip(self.parameters, self.offsets, strict=True)
        ]


def _finite(norm: Tensor, good: Tensor | None) -> Tensor:
    return norm.isfinite() if good is None else norm.isfinite() & good


def _adamw(parameters: list[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, weight_decay=weight_decay, fused=True)


Update = TorchUpdate | FusedUpdate


def make_update(
    kind: str,
    model: nn.Module,
    ema: EMA,
    *,
    weight_decay: float,
    half: Collection[nn.Parameter] = (),
    accumulate: bool = False,
    graphs: bool = False,
    skip_nonfinite: bool = False,
) -> Update:
    """`triton`: one fused pass (on a CPU by its PyTorch reference); `torch`: PyTorch's own kernels.

    Args:
        half: parameters that the network computes with in bf16; the fused update keeps copies of them.
        accumulate: whether the gradient may come in parts, of a batch or of ranks.
        graphs: whether the update must be capturable in a CUDA graph (the fused one always is).
        skip_nonfinite: whether to pass over updates that are not finite (the fused one always does).
    """
    if kind == "triton":
        return FusedUpdate(model, ema, weight_decay=weight_decay, half=half, accumulate=accumulate)
    return TorchUpdate(model, ema, weight_decay=weight_decay, graphs=graphs, skip_nonfinite=skip_nonfinite)

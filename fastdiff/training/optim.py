"""The weights' update: clip the gradient, Adam, moving average; and the learning rate.

Two implementations with one interface. `weights` are the tensors that the network computes with, by name, of which
the gradient is taken; `update(gradients, lr=..., grad_clip=...)` returns the gradient's norm as a device tensor. Their
saved states are interchangeable: both are that of torch.optim.AdamW.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import kernels
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
    """

    def __init__(self, model: nn.Module, ema: EMA, *, weight_decay: float) -> None:
        self.ema = ema
        self.weights: dict[str, Tensor] = dict(model.named_parameters())
        self.parameters = list(model.parameters())
        self.adam = torch.optim.AdamW(self.parameters, weight_decay=weight_decay, fused=True)

    def __call__(self, gradients: Sequence[Tensor], *, lr: float, grad_clip: float) -> Tensor:
        """Take one step; returns the global gradient norm before clipping, 0-dim."""
        for p, gradient in zip(self.parameters, gradients, strict=True):
            # Fused Adam walks both by memory order, so the gradient must be laid out as the weight is.
            p.grad = gradient if gradient.stride() == p.stride() else torch.empty_like(p).copy_(gradient)
        norm = nn.utils.clip_grad_norm_(self.parameters, grad_clip, foreach=True)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.ema.update()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state."""
        return self.adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from either implementation's state."""
        self.adam.load_state_dict(state)


class FusedUpdate:
    """By our kernel: clip factor, AdamW, EMA and the bf16 copies of the weights in one pass over flat buffers.

    With `bf16`, convolutions and linear layers compute with bf16 copies, which the pass itself writes, instead of
    having autocast cast every weight anew in every step; norms and the masters stay float32. The model's and the
    average's parameters become views of the flat buffers, under their old names, shapes and memory formats.

    Args:
        model: its parameters move into a flat buffer.
        ema: its parameters too.
        bf16: whether to keep bf16 copies.
    """

    def __init__(self, model: nn.Module, ema: EMA, *, weight_decay: float, bf16: bool) -> None:
        self.ema, self.weight_decay = ema, weight_decay
        self.parameters = list(model.parameters())
        averages = dict(zip(self.parameters, ema.model.parameters(), strict=True))
        cast = {
            p
            for m in model.modules()
            if bf16 and isinstance(m, nn.Conv2d | nn.Linear)
            for p in m.parameters(recurse=False)
        }
        groups = ([p for p in self.parameters if p in cast], [p for p in self.parameters if p not in cast])
        self.flats = [_Flat(group, averages, bf16=group[0] in cast) for group in groups if group]

        leaves = {p: leaf for flat in self.flats for p, leaf in zip(flat.parameters, flat.leaves, strict=True)}
        self.weights: dict[str, Tensor] = {name: leaves[p] for name, p in model.named_parameters()}
        self.place = {p: i for i, p in enumerate(self.parameters)}
        device = self.parameters[0].device
        # Device tensors, so that a captured graph would see each step's values.
        self.step, self.lr, self.decay = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor], *, lr: float, grad_clip: float) -> Tensor:
        """Take one step; returns the global gradient norm before clipping, 0-dim."""
        self.step += 1
        self.lr.fill_(lr)
        self.decay.fill_(self.ema.next_decay())
        for flat in self.flats:
            torch._foreach_copy_(flat.gradients, [gradients[self.place[p]] for p in flat.parameters])
        norms = [torch.linalg.vector_norm(flat.gradient, dtype=torch.float32) for flat in self.flats]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        clip = (grad_clip / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
        for flat in self.flats:
            kernels.adam_ema_(
                flat.parameter, flat.gradient, flat.exp_avg, flat.exp_avg_sq, flat.average, flat.half,
                step=self.step, lr=self.lr, decay=self.decay, clip=clip, weight_decay=self.weight_decay,
            )  # fmt: skip
        self.ema.copy_buffers()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, the moments as views."""
        moments = {p: m for flat in self.flats for p, m in zip(flat.parameters, flat.moments, strict=True)}
        adam = self._adam()
        for p in self.parameters:
            exp_avg, exp_avg_sq = moments[p]
            adam.state[p] = {"step": self.step.float(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from either implementation's state, and from the parameters as they are now."""
        adam = self._adam()
        adam.load_state_dict(state)
        for flat in self.flats:
            for p, (exp_avg, exp_avg_sq) in zip(flat.parameters, flat.moments, strict=True):
                self.step.copy_(adam.state[p]["step"])
                exp_avg.copy_(adam.state[p]["exp_avg"])
                exp_avg_sq.copy_(adam.state[p]["exp_avg_sq"])
            if flat.half is not None:
                flat.half.copy_(flat.parameter)

    def _adam(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.parameters, weight_decay=self.weight_decay, fused=True)


class _Flat:
    """Flat buffers for some of the parameters, and the views of them that stand for each parameter.

    parameter, average, exp_avg, exp_avg_sq   (n,) float32
    half                                      (n,) bfloat16, or None
    gradient                                  (n,) bfloat16 with half, else float32
    leaves                                    what the network computes with: views of half, or the parameters
    """

    def __init__(
        self, parameters: list[nn.Parameter], averages: dict[nn.Parameter, nn.Parameter], *, bf16: bool
    ) -> None:
        self.parameters = parameters
        self.offsets, n = [], 0
        for p in parameters:
            self.offsets.append(n)
            n += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        device = parameters[0].device
        self.parameter, self.average, self.exp_avg, self.exp_avg_sq = (torch.zeros(n, device=device) for _ in range(4))
        self.gradient = torch.zeros(n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
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


Update = TorchUpdate | FusedUpdate


def make_update(kind: str, model: nn.Module, ema: EMA, *, weight_decay: float, bf16: bool) -> Update:
    """`triton`: one fused pass (on a CPU by its PyTorch reference); `torch`: PyTorch's own kernels."""
    if kind == "triton":
        return FusedUpdate(model, ema, weight_decay=weight_decay, bf16=bf16)
    return TorchUpdate(model, ema, weight_decay=weight_decay)

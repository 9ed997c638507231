"""The optimizer and its learning rate."""

import torch
from torch import nn


def make_optimizer(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), which is Adam (Kingma & Ba 2015) at weight_decay 0, in one fused pass."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


def learning_rate(step: int, *, peak: float, warmup_steps: int) -> float:
    """Rate of the step-th update, counted from 0: a linear rise to `peak` over the warm-up, then constant."""
    return peak * min(1.0, (step + 1) / warmup_steps) if warmup_steps else peak

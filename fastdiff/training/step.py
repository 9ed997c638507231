"""One training step. Nothing in it reads a value of the device on the host."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastdiff.diffusion.objectives import Objective
from fastdiff.training.optim import Update, learning_rate


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The 63-bit seed of all randomness in a step, so that a resumed run draws what an unbroken one would have."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normalize(images: Tensor) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1]; a view of the same memory order, so channels_last."""
    return (images.permute(0, 3, 1, 2).float() - 127.5) / 127.5


@dataclass
class Metrics:
    """Sums over the steps since the last reset, as device tensors, and the first step whose loss was not finite."""

    loss: Tensor
    grad_norm: Tensor
    bad_step: Tensor
    count: int = 0


class TrainStep:
    """batch -> [-1, 1] -> t, eps -> loss under autocast -> backward -> clip -> Adam -> EMA.

    Args:
        model: the network, its weights float32 in channels_last memory.
        objective: gives the loss.
        update: clips, updates the weights and their average.
        lr, warmup_steps: the learning rate's peak and linear rise.
        grad_clip: largest global gradient norm.
        seed, rank: with the step's number, all that its randomness depends on.
        bf16: autocast activations to bfloat16.
        compile: torch.compile the forward pass and loss (and with it the backward pass).
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        update: Update,
        *,
        lr: float,
        warmup_steps: int,
        grad_clip: float,
        seed: int,
        rank: int = 0,
        bf16: bool,
        compile: bool,
    ) -> None:
        self.model, self.objective, self.update = model, objective, update
        self.lr, self.warmup_steps, self.grad_clip = lr, warmup_steps, grad_clip
        self.seed, self.rank, self.bf16 = seed, rank, bf16
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.leaves = list(update.weights.values())
        for p in self.parameters:
            if p.ndim == 4 and not p.is_contiguous(memory_format=torch.channels_last):
                raise ValueError("the network's weights must be in channels_last memory")
        self.loss: Callable[[Tensor, Tensor, Tensor], Tensor] = (
            torch.compile(self._loss, fullgraph=True) if compile else self._loss
        )
        self.metrics = self._zero_metrics()

    def _zero_metrics(self) -> Metrics:
        zero = torch.zeros((), device=self.device)
        return Metrics(zero, zero.clone(), torch.full((), -1, dtype=torch.int64, device=self.device))

    def _loss(self, images: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        x0 = normalize(images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return self.objective.loss(self._network, x0, t, eps).mean()

    def _network(self, x_t: Tensor, c_noise: Tensor, **cond: Tensor) -> Tensor:
        return functional_call(self.model, self.update.weights, (x_t, c_noise), cond)

    def __call__(self, images: Tensor, step: int) -> None:
        """Take one step.

        Args:
            images: uint8 (N, H, W, C) on the model's device, contiguous.
            step: the number of updates made before this one.
        """
        if not images.is_contiguous():
            raise ValueError("images must be contiguous (N, H, W, C), which normalisation makes channels_last")
        torch.manual_seed(step_seed(self.seed, step, self.rank))
        n, height, width, channels = images.shape
        t = self.objective.sample_t(n, device=self.device)
        eps = torch.randn(n, height, width, channels, device=self.device).permute(0, 3, 1, 2)

        loss = self.loss(images, t, eps)
        gradients = torch.autograd.grad(loss, self.leaves)
        lr = learning_rate(step, peak=self.lr, warmup_steps=self.warmup_steps)
        grad_norm = self.update(gradients, lr=lr, grad_clip=self.grad_clip)
        self._record(loss.detach(), grad_norm, step)

    def _record(self, loss: Tensor, grad_norm: Tensor, step: int) -> None:
        m = self.metrics
        m.loss += loss
        m.grad_norm += grad_norm
        bad = ~(loss.isfinite() & grad_norm.isfinite()) & (m.bad_step < 0)
        m.bad_step.masked_fill_(bad, step)
        m.count += 1

    def metrics_state(self) -> dict[str, float | int]:
        """The sums since the last reset, for a checkpoint between two rows. Waits for the device."""
        m = self.metrics
        return {"loss": m.loss.item(), "grad_norm": m.grad_norm.item(), "bad_step": int(m.bad_step), "count": m.count}

    def load_metrics_state(self, state: dict[str, float | int]) -> None:
        """Continue the sums of `metrics_state`, exactly."""
        self.metrics = self._zero_metrics()
        self.metrics.loss.fill_(state["loss"])
        self.metrics.grad_norm.fill_(state["grad_norm"])
        self.metrics.bad_step.fill_(state["bad_step"])
        self.metrics.count = int(state["count"])

    def read_metrics(self, *, reset: bool = True) -> dict[str, float]:
        """Mean `loss` and `grad_norm` of the steps since the last reset, at least one. Waits for the device."""
        state = self.metrics_state()
        if reset:
            self.metrics = self._zero_metrics()
        return {name: state[name] / state["count"] for name in ("loss", "grad_norm")}

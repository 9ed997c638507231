"""Plans: a sampler is its table of coefficients, and one loop runs every table.

A sampler is a function from a schedule and a grid of times to a plan. A plan holds the coefficients of all n steps as
rows of a table, computed in float64 before the first step, and names the function that takes one step from one row.
That function branches on no value, reads nothing back from the device, and draws the same noise in each step. So `run`
takes the steps one by one, and `evaluation/graph_loop.py` captures one step in a CUDA graph and replays it for each
row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastdiff.diffusion.schedule import Schedule
from fastdiff.errors import UserError

Denoise = Callable[..., Tensor]  # (x_t (N, C, H, W), t 0-dim float64, perhaps r) -> x0_hat (N, C, H, W)
Noise = Callable[[Tensor], Tensor]  # like (N, C, H, W) -> standard normal, of its shape
OnStep = Callable[[int, Tensor, Tensor], object]  # (i, x before step i, x0_hat of step i)
# What a step carries to the next, x first. Every member keeps its shape, dtype and device.
State = tuple[Tensor, ...]
# step(denoise, noise, t, row, state) -> (new state, x0_hat); t (k,) float64, row (m,) in x's dtype. A function of
# module level, so that nothing but its arguments decides what it does.
Step = Callable[[Denoise, Noise, Tensor, Tensor, State], tuple[State, Tensor]]


@dataclass(frozen=True)
class Rows:
    """n steps of one kind.

    step    takes one of them
    times   (n, k) float64, where each step evaluates the network
    table   (n, m) float64, the coefficients of each
    memory  number of tensors like x that a step carries besides x; zeros before the first
    """

    step: Step
    times: Tensor
    table: Tensor
    memory: int = 0

    def state(self, x: Tensor) -> State:
        """What the first step starts from."""
        return x, *(torch.zeros_like(x) for _ in range(self.memory))

    def on(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """times, and the table in x's dtype, on x's device; does not wait for the device."""
        times, table = self.times, self.table.to(x.dtype)
        if x.is_cuda:
            times, table = times.pin_memory(), table.pin_memory()
        return times.to(x.device, non_blocking=True), table.to(x.device, non_blocking=True)


Plan = Sequence[Rows]


def run(
    plan: Plan,
    denoise: Denoise,
    x_T: Tensor,
    *,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """x after all steps of a plan, taken one after the other.

    Args:
        x_T: (N, C, H, W), noise of the schedule's `prior_std`; the result has its dtype and device.
        generator: draws the noise that steps add, on the device of x_T.
        on_step: called after each step as on_step(i, x before the step, x0_hat).
    """
    x, i, noise = x_T, 0, partial(noise_like, generator=generator)
    for rows in plan:  # of some kinds there may be none
        state, (times, table) = rows.state(x), rows.on(x)
        for t, row in zip(times, table, strict=True):
            x = state[0]
            state, x0 = rows.step(denoise, noise, t, row, state)
            if on_step is not None:
                on_step(i, x, x0)
            i += 1
        x = state[0]
    return x


def evaluations(plan: Plan) -> int:
    """Network evaluations of a plan, per sample."""
    return sum(rows.times.numel() for rows in plan)


def linear(ts: Tensor, from_x_t: Tensor, from_x0: Sequence[Tensor], std: Tensor | None = None) -> list[Rows]:
    """Steps that are linear in what is known: x_s = from_x_t x_t + sum_j from_x0[j] x0_hat[j steps ago] + std z.

    Args:
        ts: the grid, or the n times at which the steps start.
        from_x_t, std: (n,) float64; nothing is drawn where std is None or 0 in every step.
        from_x0: (n,) float64 each; the j-th is 0 in the first j steps.
    """
    noisy = [std] if std is not None and bool((std > 0).any()) else []
    table = torch.stack([from_x_t, *from_x0, *noisy], 1)
    return [Rows(linear_step, ts.double().cpu()[: len(table), None], table, memory=len(from_x0) - 1)]


def linear_step(denoise: Denoise, noise: Noise, t: Tensor, row: Tensor, state: State) -> tuple[State, Tensor]:
    """A row: weights of x_t, of x0_hat, of each estimate in memory, the newest first; and of noise, if there is any."""
    x, *past = state
    weights = row.unbind()
    x0 = denoise(x, t[0])
    x = weights[0] * x + weights[1] * x0
    for weight, old in zip(weights[2:], past, strict=False):
        x = x + weight * old
    if len(weights) > len(past) + 2:
        x = x + weights[-1] * noise(x)
    return (x, *[x0, *past][: len(past)]), x0


def noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise shaped like x, in contiguous order whatever x's memory format is."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def check_grid(schedule: Schedule, ts: Tensor) -> Tensor:
    """The grid as (n + 1,) float64 on the CPU. Raises UserError unless it descends strictly, within [0, t_max]."""
    ts = ts.double().cpu()
    if ts.ndim != 1 or len(ts) < 2:
        raise UserError(f"a sampling grid needs at least 2 times in one dimension, got shape {tuple(ts.shape)}.")
    if not bool((ts[1:] < ts[:-1]).all()):
        raise UserError("a sampling grid must descend strictly, from the noisy end to the clean end.")
    if ts[-1] < 0:
        raise UserError(f"a sampling grid ends at t >= 0, got {ts[-1].item()}.")
    if ts[0] > schedule.t_max:
        raise UserError(f"a sampling grid of {schedule.name} starts at t <= {schedule.t_max:g}, got {ts[0].item()}.")
    return ts


def step_ends(schedule: Schedule, ts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha and sigma at the start t and the end s of each of the n steps: alpha_t, sigma_t, alpha_s, sigma_s,
    (n,) float64 each. Raises UserError for a bad grid."""
    ts = check_grid(schedule, ts)
    alpha, sigma = schedule.alpha(ts), schedule.sigma(ts)
    return alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]


def transition(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and variance of the forward step q(x_t | x_s) = N(alpha_ts x_s, var_ts), for any s < t."""
    alpha_ts = alpha_t / alpha_s
    return alpha_ts, (sigma_t**2 - (alpha_ts * sigma_s) ** 2).clamp(min=0.0)


def too_long(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """Which steps t -> s, (n,) bool, are too long for a differential equation: they would magnify x_t many times.

    They begin at almost pure noise (the last time of cosine), or divide the ratio of noise to signal by more than 1000
    (a grid of one or two steps down from sigma = 80).
    """
    return (alpha_t < 1e-3 * sigma_t) | (alpha_t * sigma_s < 1e-3 * sigma_t * alpha_s)

"""What all samplers share: their types, the loop that runs them, and the check of a grid of times.

A sampler puts every coefficient of its n steps into one table before the first step, in float64, and writes a step as
a static function of one row of it: no branch on a value, no read of the device, the same draws of noise in each step.
Whatever can run such a step n times is a loop: `eager_loop` here, or one that replays a captured CUDA graph.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastdiff.diffusion.base_schedule import Schedule
from fastdiff.errors import UserError

Denoise = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor, Tensor], object]

# What a sampler carries from step to step, x first. Every member keeps its shape, dtype and device.
State = tuple[Tensor, ...]
# step(t, row, state) -> (new state, x0_hat): t (k,) float64 network times, row (m,) coefficients in x's dtype.
StepFn = Callable[[Tensor, Tensor, State], tuple[State, Tensor]]


class Loop(Protocol):
    """Runs a step once for each row; see `eager_loop`."""

    def __call__(
        self,
        step: StepFn,
        state: State,
        times: Tensor,
        table: Tensor,
        *,
        generator: torch.Generator | None = None,
        on_step: OnStep | None = None,
        first: int = 0,
    ) -> State:
        """The state after the last row."""
        ...


def eager_loop(
    step: StepFn,
    state: State,
    times: Tensor,
    table: Tensor,
    *,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    first: int = 0,
) -> State:
    """Run `step` for each row, one after the other.

    Args:
        step: the body; the only thing that may draw from `generator`.
        state: (x, ...) before the first row.
        times: (n, k) float64 on x's device, what the network is asked at in each row.
        table: (n, m) coefficients in x's dtype, on its device.
        generator: unused here; a captured loop has to know whose state its replays advance.
        on_step: called as on_step(first + i, x before step i, x0_hat of step i).

    Returns:
        The state after the last row (`state` itself for n = 0).
    """
    for i in range(len(table)):
        x_t = state[0]
        state, x0 = step(times[i], table[i], state)
        if on_step is not None:
            on_step(first + i, x_t, x0)
    return state


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
    """Scale and variance of the forward step q(x_t | x_s), s < t."""
    alpha_ts = alpha_t / alpha_s
    return alpha_ts, (sigma_t**2 - (alpha_ts * sigma_s) ** 2).clamp(min=0.0)


def too_long(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """Steps t -> s, (n,) each, that are no small steps of a differential equation, which would magnify x_t many times.

    They begin at almost pure noise (the last time of cosine), or divide the ratio of noise to signal by more than 1000
    (a grid of one or two steps down from sigma = 80).
    """
    return (alpha_t < 1e-3 * sigma_t) | (alpha_t * sigma_s < 1e-3 * sigma_t * alpha_s)


def to_table(x: Tensor, *columns: Tensor) -> Tensor:
    """Columns (n,) of coefficients as the (n, m) table of a loop over x: in its dtype, on its device."""
    return _upload(torch.stack(columns, 1).to(x.dtype), x.device)


def to_times(x: Tensor, *columns: Tensor) -> Tensor:
    """Columns (n,) of network times as the (n, k) times of a loop over x: float64, on its device."""
    return _upload(torch.stack(columns, 1).to(torch.float64), x.device)


def _upload(columns: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for what it has still to do."""
    if device.type == "cuda" and not columns.is_cuda:
        columns = columns.pin_memory()
    return columns.to(device, non_blocking=True)


def clipping(denoise: Denoise, clip_x0: bool) -> Denoise:
    """`denoise`, its estimates clamped to [-1, 1] if asked."""
    return (lambda x_t, t: denoise(x_t, t).clamp(-1.0, 1.0)) if clip_x0 else denoise


def run_linear(
    denoise: Denoise,
    x_T: Tensor,
    ts: Tensor,
    from_x_t: Tensor,
    from_x0: Sequence[Tensor],
    std: Tensor | None = None,
    *,
    generator: torch.Generator | None,
    on_step: OnStep | None,
    loop: Loop,
    first: int = 0,
) -> Tensor:
    """Steps that are linear in what is known: x_s = from_x_t x_t + sum_j from_x0[j] x0_hat[j] + std z.

    Args:
        ts: the grid, or the n times at which the steps start.
        from_x_t, std: (n,) float64; nothing is drawn where std is None or 0 in every step.
        from_x0: (n,) float64 each; the j-th weighs the estimate of j steps ago, and is 0 in the first j steps.

    Returns:
        x after the last step.
    """
    noisy = std is not None and bool((std > 0).any())
    columns = [from_x_t, *from_x0, *([std] if noisy and std is not None else [])]

    def step(t: Tensor, row: Tensor, state: State) -> tuple[State, Tensor]:
        x, *past = state
        weights = row.unbind()
        x0 = denoise(x, t[0])
        x = weights[0] * x + weights[1] * x0
        for weight, old in zip(weights[2:], past, strict=False):
            x = x + weight * old
        if noisy:
            x = x + weights[-1] * noise_like(x, generator)
        return (x, *[x0, *past][: len(past)]), x0

    state = (x_T, *[torch.zeros_like(x_T) for _ in from_x0[1:]])
    times, table = to_times(x_T, ts[: len(from_x_t)]), to_table(x_T, *columns)
    return loop(step, state, times, table, generator=generator, on_step=on_step, first=first)[0]


def noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise shaped like x, contiguous order whatever x's memory format."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)

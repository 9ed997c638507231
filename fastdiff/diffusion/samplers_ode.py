"""Euler and Heun for the probability-flow ODE, with EDM's churn (Karras et al. 2022, algorithm 2).

EDM integrates in rho = sigma / alpha and x / alpha, where the ODE is d(x / alpha) / d rho = (x / alpha - x0_hat) / rho
(eq. 4 with s = alpha). Here x itself is kept and the scalings are multiplied out, so that every coefficient stays
finite at the ends: alpha(t_max) = 0 (rho infinite) and sigma(0) = 0.
"""

import math

import torch
from torch import Tensor

from fastdiff.diffusion.base_schedule import Schedule
from fastdiff.diffusion.loops import (
    Denoise,
    Loop,
    OnStep,
    State,
    check_grid,
    clipping,
    eager_loop,
    noise_like,
    to_table,
    to_times,
    too_long,
)
from fastdiff.errors import UserError


def euler(
    denoise: Denoise,
    schedule: Schedule,
    x_T: Tensor,
    ts: Tensor,
    *,
    S_churn: float = 0.0,
    S_tmin: float = 0.0,
    S_tmax: float = math.inf,
    S_noise: float = 1.0,
    clip_x0: bool = False,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    loop: Loop = eager_loop,
) -> Tensor:
    """Euler's method in sigma / alpha: first order, one evaluation a step. Without churn it is ddim with eta = 0.

    Args:
        S_churn, S_tmin, S_tmax, S_noise: see `heun`.
        clip_x0: clamp each x0_hat to [-1, 1].

    Raises:
        UserError: a bad grid or a bad churn option.
    """
    churn = _Churn(schedule, ts, S_churn, S_tmin, S_tmax, S_noise)
    denoise = clipping(denoise, clip_x0)
    return _run(denoise, churn, x_T, 0, churn.n, second_order=False, generator=generator, on_step=on_step, loop=loop)


def heun(
    denoise: Denoise,
    schedule: Schedule,
    x_T: Tensor,
    ts: Tensor,
    *,
    S_churn: float = 0.0,
    S_tmin: float = 0.0,
    S_tmax: float = math.inf,
    S_noise: float = 1.0,
    clip_x0: bool = False,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    loop: Loop = eager_loop,
) -> Tensor:
    """Heun's method in sigma / alpha (Karras et al. 2022, algorithm 2): second order, two evaluations a step.

    A step to sigma = 0 is Euler's (algorithm 2, line 8): n steps down to t = 0 cost 2n - 1 evaluations. Where there is
    hardly any signal, alpha / sigma < 1 / 1000, a slope in sigma / alpha says nothing about a whole step; from there
    the same rule is taken in alpha / sigma and x / sigma, where the slope is x0_hat.

    Args:
        S_churn: how much noise is added and removed again over the whole run; 0 is deterministic. Each of the n steps
            first goes back to gamma = min(S_churn / n, sqrt(2) - 1) times more noise, but never beyond t_max.
        S_tmin, S_tmax: values of sigma / alpha between which noise is added.
        S_noise: standard deviation of the added noise; slightly above 1 makes up for a denoiser that blurs.
        clip_x0: clamp each x0_hat to [-1, 1].

    Raises:
        UserError: a bad grid or a bad churn option.
    """
    churn = _Churn(schedule, ts, S_churn, S_tmin, S_tmax, S_noise)
    denoise = clipping(denoise, clip_x0)
    end = churn.n - int(churn.sigma_s[-1] == 0)
    x = _run(denoise, churn, x_T, 0, end, second_order=True, generator=generator, on_step=on_step, loop=loop)
    return _run(denoise, churn, x, end, churn.n, second_order=False, generator=generator, on_step=on_step, loop=loop)


class _Churn:
    """The grid of a run with churn: step i goes from ts[i] up to a noisier t[i] >= ts[i], then down to s[i].

    All members are (n,) float64. x at t is stretch * (x at ts) + std * z.
    """

    def __init__(
        self, schedule: Schedule, ts: Tensor, S_churn: float, S_tmin: float, S_tmax: float, S_noise: float
    ) -> None:
        for name, value in (("S_churn", S_churn), ("S_tmin", S_tmin), ("S_tmax", S_tmax), ("S_noise", S_noise)):
            if not value >= 0:
                raise UserError(f"{name} is {value}, but must be at least 0.")
        ts = check_grid(schedule, ts)
        alpha, sigma = schedule.alpha(ts), schedule.sigma(ts)
        self.n = len(ts) - 1
        self.s, self.alpha_s, self.sigma_s = ts[1:], alpha[1:], sigma[1:]
        start, alpha, sigma = ts[:-1], alpha[:-1], sigma[:-1]
        # Algorithm 2, line 4; gamma = min(S_churn / N, sqrt(2) - 1) inside [S_tmin, S_tmax].
        rho = sigma / alpha
        churned = (rho >= S_tmin) & (rho <= S_tmax) & (alpha > 0)
        gamma = min(S_churn / self.n, math.sqrt(2.0) - 1.0) * churned.double()
        # The noisier time; a schedule ends at t_max, and a network has seen nothing beyond it.
        noisier = schedule.t_of_log_snr(schedule.log_snr(start) - 2.0 * torch.log1p(gamma))
        self.t = torch.where(gamma > 0, noisier, start)
        self.alpha, self.sigma = schedule.alpha(self.t), schedule.sigma(self.t)
        # Lines 5 and 6: x_hat / alpha_hat = x / alpha + sqrt(rho_hat^2 - rho^2) S_noise z, times alpha_hat.
        self.stretch = torch.where(gamma > 0, self.alpha / alpha, 1.0)
        self.std = S_noise * (self.sigma**2 - (self.stretch * sigma) ** 2).clamp(min=0.0).sqrt()


def _run(
    denoise: Denoise,
    churn: _Churn,
    x: Tensor,
    begin: int,
    end: int,
    *,
    second_order: bool,
    generator: torch.Generator | None,
    on_step: OnStep | None,
    loop: Loop,
) -> Tensor:
    """x after the steps begin..end of a churned grid, by Euler's or by Heun's method."""
    if begin == end:
        return x
    noisy = bool((churn.std > 0).any())
    # Lines 7 and 8: x' = x_hat + (rho_s - rho_hat) d with d = (x_hat - x0_hat) / rho_hat, that is
    # x' = (sigma_s / sigma) x_hat + alpha_s (1 - r) x0_hat, where r = rho_s / rho_hat.
    scale = churn.sigma_s / churn.sigma
    to_x0 = churn.alpha_s - churn.alpha * scale
    # Lines 10 and 11, d replaced by (d + d') / 2: x0_hat by its mix with that at s, weighed by 1 / (2r).
    # In alpha / sigma it is the mean of the two.
    long = too_long(churn.alpha, churn.sigma, churn.alpha_s, churn.sigma_s)
    mix = torch.where(long, 0.5, churn.alpha_s / (2.0 * churn.alpha * scale))

    def step(t: Tensor, row: Tensor, state: State) -> tuple[State, Tensor]:
        (x,) = state
        stretch, std, a, b, c = row.unbind()
        if noisy:
            x = stretch * x + std * noise_like(x, generator)
        x0 = denoise(x, t[0])
        x_s = a * x + b * x0
        if second_order:
            x_s = x_s + c * (denoise(x_s, t[1]) - x0)
        return (x_s,), x0

    rows = slice(begin, end)
    times = to_times(x, churn.t[rows], churn.s[rows])
    columns = (churn.stretch, churn.std, scale, to_x0, to_x0 * mix)
    table = to_table(x, *[column[rows] for column in columns])
    return loop(step, (x,), times, table, generator=generator, on_step=on_step, first=begin)[0]

"""Samplers that discretise the reverse-time SDE of Song et al. 2021 (Score-Based Generative Modeling through SDEs).

    dx = [f x - g^2 score(x, t)] dt + g dw        (eq. 6), score(x, t) = (alpha x0_hat - x) / sigma^2

f and g are not needed: over a step from t down to s the forward process scales by alpha_ts = alpha_t / alpha_s, whose
logarithm is the integral of f, and adds the variance var_ts = sigma_t^2 - alpha_ts^2 sigma_s^2, the integral of
g^2 to first order in the step (exactly for VE) and, unlike it, stays bounded in a large one.

Two steps have no such form and are the exact conditional law given x0_hat instead, alpha_s x0_hat + sigma_s z: from
(almost) pure noise, where x_t tells nothing, and to sigma = 0, where it returns x0_hat (the last step of appendix G).
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
    clipping,
    eager_loop,
    noise_like,
    run_linear,
    step_ends,
    to_table,
    to_times,
    too_long,
    transition,
)
from fastdiff.errors import UserError


def euler_maruyama(
    denoise: Denoise,
    schedule: Schedule,
    x_T: Tensor,
    ts: Tensor,
    *,
    clip_x0: bool = False,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    loop: Loop = eager_loop,
) -> Tensor:
    """Euler-Maruyama for the reverse SDE (Song et al. 2021, eq. 6 and appendix D.1).

    Args:
        clip_x0: clamp each x0_hat to [-1, 1]; the score follows from the clamped value.

    Raises:
        UserError: a bad grid.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = step_ends(schedule, ts)
    alpha_ts, var_ts = transition(alpha_t, sigma_t, alpha_s, sigma_s)
    # x_s = x_t - (integral of f) x_t + var_ts score + sqrt(var_ts) z, and the integral of f is log alpha_ts.
    from_x_t, from_x0, std = _ends(1.0 - alpha_ts.log(), var_ts, alpha_t, sigma_t, alpha_s, sigma_s)
    denoise = clipping(denoise, clip_x0)
    return run_linear(denoise, x_T, ts, from_x_t, [from_x0], std, generator=generator, on_step=on_step, loop=loop)


def predictor_corrector(
    denoise: Denoise,
    schedule: Schedule,
    x_T: Tensor,
    ts: Tensor,
    *,
    snr: float = 0.16,
    corrector_steps: int = 1,
    clip_x0: bool = False,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    loop: Loop = eager_loop,
) -> Tensor:
    """Reverse diffusion followed by Langevin steps at each noise level (Song et al. 2021, algorithms 2 to 5).

    n steps down to t = 0 cost n + (n - 1) corrector_steps evaluations: there is no noise left to correct at the end.

    Args:
        snr: r, the size of a Langevin step's drift beside its noise.
        corrector_steps: M, Langevin steps after each reverse diffusion step.
        clip_x0: clamp each x0_hat to [-1, 1]; the score follows from the clamped value.

    Raises:
        UserError: snr not a finite number above 0, corrector_steps below 1, or a bad grid.
    """
    if not 0.0 < snr < math.inf:
        raise UserError(f"snr is {snr}, but must be a finite number above 0 (0.16 is usual).")
    if corrector_steps != int(corrector_steps) or corrector_steps < 1:
        raise UserError(f"corrector_steps is {corrector_steps}, but must be a whole number of at least 1.")
    alpha_t, sigma_t, alpha_s, sigma_s = step_ends(schedule, ts)
    alpha_ts, var_ts = transition(alpha_t, sigma_t, alpha_s, sigma_s)
    # Eq. 46: x_s = x_t - f(x_t) + G^2 score + G z for the forward step x_t = x_s + f(x_s) + G z; f = (alpha_ts - 1) x.
    from_x_t, from_x0, std = _ends(2.0 - alpha_ts, var_ts, alpha_t, sigma_t, alpha_s, sigma_s)
    # Algorithms 4 and 5: epsilon = 2 alpha (r |z| / |g|)^2, where alpha = 1 - beta of the forward step into s (1 for
    # VE), |z| is sqrt(d) as the paper advises for small batches, and |g| is the mean over the batch.
    into_s = torch.cat([alpha_ts[1:], alpha_s[-1:]])
    d = x_T[0].numel()
    epsilon = 2.0 * into_s**2 * snr**2 * d
    # The mean square of a score is at least d over the variance of what it is the score of (Cramer and Rao), here at
    # most sigma^2 + alpha^2 for data in [-1, 1]. Without this floor a small |g|, far from the data, is a huge step.
    least = d / (sigma_s**2 + alpha_s**2)
    denoise = clipping(denoise, clip_x0)
    n = len(ts) - 1 if sigma_s[-1] > 0 else len(ts) - 2  # the corrected steps

    def step(t: Tensor, row: Tensor, state: State) -> tuple[State, Tensor]:
        (x,) = state
        a, b, c, to_x0, to_x, eps, floor = row.unbind()
        x0 = denoise(x, t[0])
        x = a * x + b * x0 + c * noise_like(x, generator)
        for _ in range(int(corrector_steps)):
            g = to_x0 * denoise(x, t[1]) - to_x * x  # the score at s
            size = eps / g.flatten(1).norm(dim=1).mean().square().maximum(floor)
            x = x + size * g + (2.0 * size).sqrt() * noise_like(x, generator)
        return (x,), x0

    x = x_T
    if n > 0:
        times = to_times(x, ts[:n], ts[1 : n + 1])
        columns = (from_x_t, from_x0, std, alpha_s / sigma_s**2, 1.0 / sigma_s**2, epsilon, least)
        table = to_table(x, *[column[:n] for column in columns])
        x = loop(step, (x,), times, table, generator=generator, on_step=on_step)[0]
    if n < len(ts) - 1:  # down to sigma = 0
        x = run_linear(
            denoise, x, ts[n:], from_x_t[n:], [from_x0[n:]], generator=generator, on_step=on_step, loop=loop, first=n
        )
    return x


def _ends(
    scale: Tensor, var_ts: Tensor, alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of x_t, x0_hat and z in x_s = scale x_t + var_ts score + sqrt(var_ts) z, the two ends replaced."""
    at_end = too_long(alpha_t, sigma_t, alpha_s, sigma_s) | (sigma_s == 0)
    share = var_ts / sigma_t**2
    from_x_t = torch.where(at_end, 0.0, scale - share)
    from_x0 = torch.where(at_end, alpha_s, alpha_t * share)
    return from_x_t, from_x0, torch.where(at_end, sigma_s, var_ts.sqrt())

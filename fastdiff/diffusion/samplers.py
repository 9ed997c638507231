"""Samplers: from noise to images with a denoiser.

A sampler is a plain function `f(denoise, schedule, x_T, ts, *, generator=None, **options) -> x_0`:

    denoise    `denoise(x_t, t) -> x0_hat`, (N, C, H, W) for a 0-dim float64 t
    x_T        (N, C, H, W), standard normal for variance-preserving schedules; the result has its dtype and device
    ts         (n + 1,) float64 descending times, ts[-1] = 0 for clean images: `schedule.grid(n)`
    generator  source of the noise that stochastic samplers add, on the device of x_T
    on_step    called as on_step(i, x_t, x0_hat) after each network evaluation, for figures and progress

Every coefficient is computed in float64 before the loop. The loop body reads no value on the host.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.diffusion.schedules import DiscreteSchedule
from fastdiff.errors import UserError

Denoise = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor, Tensor], object]


def ddpm(
    denoise: Denoise,
    schedule: DiscreteSchedule,
    x_T: Tensor,
    ts: Tensor,
    *,
    variance: str = "fixed-small",
    clip_x0: bool = False,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on any subsequence of the times.

    Args:
        variance: of the noise added on the way from t to s: `fixed-small` is the posterior's, beta-tilde (eq. 7);
            `fixed-large` is beta, that of the forward step from s to t (section 3.2).
        clip_x0: clamp each x0_hat to [-1, 1].

    Raises:
        UserError: an unknown variance, or a bad grid.
    """
    if variance not in ("fixed-small", "fixed-large"):
        raise UserError(f"variance {variance!r} is unknown; choose fixed-small or fixed-large.")
    alpha_t, sigma_t, alpha_s, sigma_s = _steps(schedule, ts)
    # q(x_t | x_s) = N(alpha_ts x_s, var_ts), generalised from one step to any s < t.
    alpha_ts, var_ts = _transition(alpha_t, sigma_t, alpha_s, sigma_s)
    # Posterior mean of q(x_s | x_t, x0), eq. 7: a weighted sum of x_t and x0.
    from_x_t = alpha_ts * sigma_s**2 / sigma_t**2
    from_x0 = alpha_s * var_ts / sigma_t**2
    std = (var_ts if variance == "fixed-large" else var_ts * sigma_s**2 / sigma_t**2).sqrt()
    std = torch.where(sigma_s > 0, std, 0.0)  # the last step returns the mean (algorithm 2, line 3)
    return _run(denoise, x_T, ts, from_x_t, from_x0, std, clip_x0, generator, on_step)


def ddim(
    denoise: Denoise,
    schedule: DiscreteSchedule,
    x_T: Tensor,
    ts: Tensor,
    *,
    eta: float = 0.0,
    clip_x0: bool = False,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12): deterministic for eta = 0, as noisy as DDPM's fixed-small for eta = 1.

    Args:
        eta: share of the posterior's standard deviation that is drawn afresh, in [0, 1] (eq. 16).
        clip_x0: clamp each x0_hat to [-1, 1]; the noise estimate follows from the clamped value.

    Raises:
        UserError: eta outside [0, 1], or a bad grid.
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta is {eta}, but must lie in [0, 1] (0: deterministic, 1: as noisy as DDPM).")
    alpha_t, sigma_t, alpha_s, sigma_s = _steps(schedule, ts)
    _, var_ts = _transition(alpha_t, sigma_t, alpha_s, sigma_s)
    std = eta * sigma_s / sigma_t * var_ts.sqrt()
    # x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z, with eps = (x_t - alpha_t x0) / sigma_t.
    from_x_t = (sigma_s**2 - std**2).clamp(min=0.0).sqrt() / sigma_t
    from_x0 = alpha_s - alpha_t * from_x_t
    return _run(denoise, x_T, ts, from_x_t, from_x0, std, clip_x0, generator, on_step)


def _steps(schedule: DiscreteSchedule, ts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha and sigma at the start t and the end s of each of the n steps: four (n,) float64 tensors."""
    ts = ts.double().cpu()
    if ts.ndim != 1 or len(ts) < 2:
        raise UserError(f"a sampling grid needs at least 2 times in one dimension, got shape {tuple(ts.shape)}.")
    if not bool((ts[1:] < ts[:-1]).all()):
        raise UserError("a sampling grid must descend strictly, from the noisy end to the clean end.")
    if ts[-1] < 0:
        raise UserError(f"a sampling grid ends at t >= 0, got {ts[-1].item()}.")
    alpha, sigma = schedule.alpha(ts), schedule.sigma(ts)
    return alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]


def _transition(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and variance of the forward step q(x_t | x_s), s < t."""
    alpha_ts = alpha_t / alpha_s
    return alpha_ts, (sigma_t**2 - (alpha_ts * sigma_s) ** 2).clamp(min=0.0)


def _run(
    denoise: Denoise,
    x_T: Tensor,
    ts: Tensor,
    from_x_t: Tensor,
    from_x0: Tensor,
    std: Tensor,
    clip_x0: bool,
    generator: torch.Generator | None,
    on_step: OnStep | None,
) -> Tensor:
    """x_s = from_x_t * x_t + from_x0 * x0_hat + std * z, step by step."""
    noisy = (std > 0).tolist()
    coefficients = torch.stack([from_x_t, from_x0, std], 1).to(x_T.device, x_T.dtype)
    times = ts.to(x_T.device, torch.float64)
    x = x_T
    for i in range(len(noisy)):
        x0 = denoise(x, times[i])
        if clip_x0:
            x0 = x0.clamp(-1.0, 1.0)
        if on_step is not None:
            on_step(i, x, x0)
        a, b, c = coefficients[i]
        x = a * x + b * x0
        if noisy[i]:
            x = x + c * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddpm": ddpm, "ddim": ddim}

"""Samplers: from noise to images with a denoiser.

Each function here (and in multistep.py) turns a schedule and a grid into a plan, the table of its steps' coefficients.
`SAMPLERS` holds them in their public form `f(denoise, schedule, x_T, ts, *, clip_x0=False, generator=None,
on_step=None, **options) -> x_0`:

    denoise    `denoise(x_t, t) -> x0_hat`, (N, C, H, W) for a 0-dim float64 t; consistency and flow-map pass r as well
    x_T        (N, C, H, W), `schedule.prior_std` times standard normal noise; the result has its dtype and device
    ts         (n + 1,) float64 descending times, ts[-1] = 0 for clean images: `schedule.grid(n)`
    clip_x0    clamp each x0_hat to [-1, 1]; scores and noise estimates follow from the clamped value
    generator  source of the noise that stochastic samplers add, on the device of x_T
    on_step    called after step i as on_step(i, x_t before the step, x0_hat), for figures and progress
    options    the sampler's own, see its function; each raises UserError for a bad grid or option
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.diffusion import multistep, plan
from fastdiff.diffusion.plan import (
    Denoise,
    Noise,
    OnStep,
    Plan,
    Rows,
    State,
    check_grid,
    linear,
    step_ends,
    too_long,
    transition,
)
from fastdiff.diffusion.schedule import Schedule
from fastdiff.errors import UserError


def ddpm(schedule: Schedule, ts: Tensor, *, variance: str = "fixed-small") -> Plan:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on any subsequence of the times.

    Args:
        variance: of the noise added from t to s. `fixed-small` is the posterior's variance, beta-tilde (eq. 7);
            `fixed-large` is beta, the variance of the forward step from s to t (section 3.2).
    """
    if variance not in ("fixed-small", "fixed-large"):
        raise UserError(f"variance {variance!r} is unknown; choose fixed-small or fixed-large.")
    alpha_t, sigma_t, alpha_s, sigma_s = step_ends(schedule, ts)
    alpha_ts, var_ts = transition(alpha_t, sigma_t, alpha_s, sigma_s)
    # Posterior mean of q(x_s | x_t, x0), eq. 7: a weighted sum of x_t and x0.
    from_x_t = alpha_ts * sigma_s**2 / sigma_t**2
    from_x0 = alpha_s * var_ts / sigma_t**2
    std = (var_ts if variance == "fixed-large" else var_ts * sigma_s**2 / sigma_t**2).sqrt()
    return linear(ts, from_x_t, [from_x0], torch.where(sigma_s > 0, std, 0.0))  # the last step returns the mean


def ddim(schedule: Schedule, ts: Tensor, *, eta: float = 0.0) -> Plan:
    """DDIM (Song et al. 2021, eq. 12): deterministic for eta = 0, as noisy as DDPM's fixed-small for eta = 1.

    Args:
        eta: share of the posterior's standard deviation that is drawn afresh, in [0, 1] (eq. 16).
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta is {eta}, but must lie in [0, 1] (0: deterministic, 1: as noisy as DDPM).")
    alpha_t, sigma_t, alpha_s, sigma_s = step_ends(schedule, ts)
    _, var_ts = transition(alpha_t, sigma_t, alpha_s, sigma_s)
    std = eta * sigma_s / sigma_t * var_ts.sqrt()
    # x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z, with eps = (x_t - alpha_t x0) / sigma_t.
    from_x_t = (sigma_s**2 - std**2).clamp(min=0.0).sqrt() / sigma_t
    return linear(ts, from_x_t, [alpha_s - alpha_t * from_x_t], std)


def consistency(schedule: Schedule, ts: Tensor) -> Plan:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): the estimate of x0, then fresh noise up to s.

    For a consistency model every estimate is a sample, and those after the first mend it. `Schedule.grid` has a spacing
    for it, `few-step`. Of other networks each estimate is a blurred mean. A single step is ddim's.
    """
    return flow_map(schedule, ts, gamma=1.0)


def flow_map(schedule: Schedule, ts: Tensor, *, gamma: float = 0.0) -> Plan:
    """Steps of a flow map: from t down to r, then noise up to s (Kim et al. 2024, algorithm 2).

    The denoiser is told r. With gamma = 0 the step ends at s, with 1 at the data. By one that heeds no r it is ddim.

    Args:
        gamma: share of the noise at s that is drawn afresh, in [0, 1]: rho_r = sqrt(1 - gamma^2) rho_s.
    """
    if not 0.0 <= gamma <= 1.0:
        raise UserError(f"gamma is {gamma}, but must lie in [0, 1] (0: deterministic, 1: as the sampler consistency).")
    alpha_t, sigma_t, alpha_s, sigma_s = step_ends(schedule, ts)
    s = check_grid(schedule, ts)[1:]
    r = schedule.t_of_log_snr(schedule.log_snr(s) - math.log1p(-(gamma**2))) if gamma < 1 else torch.zeros_like(s)
    r = torch.where(s > 0, s if gamma == 0 else r, 0.0)
    alpha_r, sigma_r = schedule.alpha(r), schedule.sigma(r)
    keep, rescale = sigma_r / sigma_t, alpha_s / alpha_r
    std = (sigma_s**2 - (rescale * sigma_r) ** 2).clamp(min=0.0).sqrt() if gamma > 0 else torch.zeros_like(s)
    noisy = [std] if bool((std > 0).any()) else []
    table = torch.stack([rescale * keep, rescale * (alpha_r - alpha_t * keep), r, *noisy], 1)
    return [Rows(mapped_step, ts.double().cpu()[:-1, None], table)]


def mapped_step(denoise: Denoise, noise: Noise, t: Tensor, row: Tensor, state: State) -> tuple[State, Tensor]:
    """A row: weights of x_t and of x0_hat; r; and the weight of noise, if there is any."""
    (x,) = state
    a, b, r, *std = row.unbind()
    x0 = denoise(x, t[0], r.to(t.dtype))
    x = a * x + b * x0
    return (x + std[0] * noise(x) if std else x,), x0


def euler_ancestral(schedule: Schedule, ts: Tensor, *, eta: float = 1.0) -> Plan:
    """An Euler step to a noise level below s's own, then fresh noise up to it (k-diffusion's euler_ancestral).

    With rho = sigma / alpha and in x / alpha: rho_up = eta rho_s / rho_t sqrt(rho_t^2 - rho_s^2), and Euler goes down
    to rho_down = sqrt(rho_s^2 - rho_up^2). Multiplied by alpha_s these are the terms of DDIM's eq. 12, so the two
    samplers are the same, and eta means the same in both. Only the default differs.
    """
    return ddim(schedule, ts, eta=eta)


# Euler and Heun for the probability-flow ODE, with EDM's churn (Karras et al. 2022, algorithm 2). EDM integrates in
# rho = sigma / alpha and x / alpha, where the ODE is d(x / alpha) / d rho = (x / alpha - x0_hat) / rho (eq. 4 with
# s = alpha). Here x itself is kept and the scalings are multiplied out, so that every coefficient stays finite at the
# ends: alpha(t_max) = 0 (rho infinite) and sigma(0) = 0.


def euler(
    schedule: Schedule, ts: Tensor, *, S_churn: float = 0.0, S_tmin: float = 0.0, S_tmax: float = math.inf,
    S_noise: float = 1.0,
) -> Plan:  # fmt: skip
    """Euler's method in sigma / alpha: first order, one evaluation a step. Without churn it is ddim with eta = 0.

    Args:
        S_churn, S_tmin, S_tmax, S_noise: see `heun`.
    """
    times, table = _churned(schedule, ts, S_churn, S_tmin, S_tmax, S_noise)
    return [Rows(churned_step, times[:, :1], table)]


def heun(
    schedule: Schedule, ts: Tensor, *, S_churn: float = 0.0, S_tmin: float = 0.0, S_tmax: float = math.inf,
    S_noise: float = 1.0,
) -> Plan:  # fmt: skip
    """Heun's method in sigma / alpha (Karras et al. 2022, algorithm 2): second order, two evaluations a step.

    A step to sigma = 0 is Euler's (algorithm 2, line 8): n steps down to t = 0 cost 2n - 1 evaluations. Where there is
    hardly any signal, alpha / sigma < 1 / 1000, a slope in sigma / alpha says nothing about a whole step; from there
    the same rule is taken in alpha / sigma and x / sigma, where the slope is x0_hat.

    Args:
        S_churn: how much noise is added and removed again over the whole run; 0 is deterministic. Each of the n steps
            first goes back to gamma = min(S_churn / n, sqrt(2) - 1) times more noise, but never beyond t_max.
        S_tmin, S_tmax: values of sigma / alpha between which noise is added.
        S_noise: standard deviation of the added noise; slightly above 1 makes up for a denoiser that blurs.
    """
    times, table = _churned(schedule, ts, S_churn, S_tmin, S_tmax, S_noise)
    n = len(table) - int(schedule.sigma(ts)[-1] == 0)
    return [Rows(churned_step, times[:n], table[:n]), Rows(churned_step, times[n:, :1], table[n:])]


def churned_step(denoise: Denoise, noise: Noise, t: Tensor, row: Tensor, state: State) -> tuple[State, Tensor]:
    """The noise of the churn, if there is any, then Euler's step, or Heun's where t has a second time."""
    (x,) = state
    a, b, c, *churn = row.unbind()
    if churn:
        stretch, std = churn
        x = stretch * x + std * noise(x)
    x0 = denoise(x, t[0])
    x_s = a * x + b * x0
    if len(t) == 2:
        x_s = x_s + c * (denoise(x_s, t[1]) - x0)
    return (x_s,), x0


def _churned(
    schedule: Schedule, ts: Tensor, S_churn: float, S_tmin: float, S_tmax: float, S_noise: float
) -> tuple[Tensor, Tensor]:
    """Step i goes from ts[i] up to a noisier t[i] >= ts[i], then down to s[i].

    Returns:
        The times t and s, (n, 2), and the rows of `churned_step`, (n, 3 or 5); float64.
    """
    for name, value in (("S_churn", S_churn), ("S_tmin", S_tmin), ("S_tmax", S_tmax), ("S_noise", S_noise)):
        if not value >= 0:
            raise UserError(f"{name} is {value}, but must be at least 0.")
    ts = check_grid(schedule, ts)
    start, s, n = ts[:-1], ts[1:], len(ts) - 1
    alpha_start, sigma_start, alpha_s, sigma_s = step_ends(schedule, ts)
    # Algorithm 2, line 4; gamma = min(S_churn / N, sqrt(2) - 1) inside [S_tmin, S_tmax].
    rho = sigma_start / alpha_start
    churned = (rho >= S_tmin) & (rho <= S_tmax) & (alpha_start > 0)
    gamma = min(S_churn / n, math.sqrt(2.0) - 1.0) * churned.double()
    # The noisier time; a schedule ends at t_max, and a network has seen nothing beyond it.
    noisier = schedule.t_of_log_snr(schedule.log_snr(start) - 2.0 * torch.log1p(gamma))
    t = torch.where(gamma > 0, noisier, start)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    # Lines 5 and 6: x_hat / alpha_hat = x / alpha + sqrt(rho_hat^2 - rho^2) S_noise z, times alpha_hat.
    stretch = torch.where(gamma > 0, alpha / alpha_start, 1.0)
    std = S_noise * (sigma**2 - (stretch * sigma_start) ** 2).clamp(min=0.0).sqrt()
    # Lines 7 and 8: x' = x_hat + (rho_s - rho_hat) d with d = (x_hat - x0_hat) / rho_hat, that is
    # x' = (sigma_s / sigma) x_hat + alpha_s (1 - r) x0_hat, where r = rho_s / rho_hat.
    scale = sigma_s / sigma
    to_x0 = alpha_s - alpha * scale
    # Lines 10 and 11, d replaced by (d + d') / 2: x0_hat by its mix with that at s, weighed by 1 / (2r).
    # In alpha / sigma it is the mean of the two.
    mix = torch.where(too_long(alpha, sigma, alpha_s, sigma_s), 0.5, alpha_s / (2.0 * alpha * scale))
    churn = [stretch, std] if bool((std > 0).any()) else []
    return torch.stack([t, s], 1), torch.stack([scale, to_x0, to_x0 * mix, *churn], 1)


# Samplers that discretise the reverse-time SDE of Song et al. 2021 (Score-Based Generative Modeling through SDEs),
#     dx = [f x - g^2 score(x, t)] dt + g dw        (eq. 6), score(x, t) = (alpha x0_hat - x) / sigma^2.
# f and g are not needed: over a step from t down to s the forward process scales by alpha_ts = alpha_t / alpha_s, whose
# logarithm is the integral of f, and adds the variance var_ts = sigma_t^2 - alpha_ts^2 sigma_s^2, the integral of
# g^2 to first order in the step (exactly for VE) and, unlike it, stays bounded in a large one.


def euler_maruyama(schedule: Schedule, ts: Tensor) -> Plan:
    """Euler-Maruyama for the reverse SDE (Song et al. 2021, eq. 6 and appendix D.1)."""
    ends = step_ends(schedule, ts)
    alpha_ts, var_ts = transition(*ends)
    # x_s = x_t - (integral of f) x_t + var_ts score + sqrt(var_ts) z, and the integral of f is log alpha_ts.
    from_x_t, from_x0, std = _reverse(1.0 - alpha_ts.log(), var_ts, *ends)
    return linear(ts, from_x_t, [from_x0], std)


def predictor_corrector(schedule: Schedule, ts: Tensor, *, snr: float = 0.16, corrector_steps: int = 1) -> Plan:
    """Reverse diffusion followed by Langevin steps at each noise level (Song et al. 2021, algorithms 2 to 5).

    n steps down to t = 0 cost n + (n - 1) corrector_steps evaluations: there is no noise left to correct at the end.

    Args:
        snr: r, the size of a Langevin step's drift beside its noise; above 0.
        corrector_steps: M, Langevin steps after each reverse diffusion step; at least 1.
    """
    if not 0.0 < snr < math.inf:
        raise UserError(f"snr is {snr}, but must be a finite number above 0 (0.16 is usual).")
    if corrector_steps != int(corrector_steps) or corrector_steps < 1:
        raise UserError(f"corrector_steps is {corrector_steps}, but must be a whole number of at least 1.")
    ends = step_ends(schedule, ts)
    alpha_s, sigma_s = ends[2:]
    alpha_ts, var_ts = transition(*ends)
    # Eq. 46: x_s = x_t - f(x_t) + G^2 score + G z for the forward step x_t = x_s + f(x_s) + G z; f = (alpha_ts - 1) x.
    from_x_t, from_x0, std = _reverse(2.0 - alpha_ts, var_ts, *ends)
    # Algorithms 4 and 5: epsilon = 2 alpha (r |z| / |g|)^2, where alpha = 1 - beta of the forward step into s (1 for
    # VE), |z|^2 is d, the numbers of an image, as the paper advises for small batches, and |g| the batch's mean.
    epsilon = 2.0 * torch.cat([alpha_ts[1:], alpha_s[-1:]]) ** 2 * snr**2
    # Cramer and Rao: a score's mean square is at least d over the variance of x, which is at most sigma^2 + alpha^2
    # for data in [-1, 1]. Without this floor a small |g|, far from the data, would make a huge step.
    least = 1.0 / (sigma_s**2 + alpha_s**2)
    n = len(ts) - 1 if sigma_s[-1] > 0 else len(ts) - 2  # the corrected steps; one to sigma = 0 is none
    columns = (from_x_t, from_x0, std, alpha_s / sigma_s**2, 1.0 / sigma_s**2, epsilon, least)
    times = torch.stack([ts[:n], *[ts[1 : n + 1]] * int(corrector_steps)], 1).double().cpu()
    corrected = Rows(corrected_step, times, torch.stack(columns, 1)[:n])
    return [corrected, *linear(ts[n:], from_x_t[n:], [from_x0[n:]])]


def corrected_step(denoise: Denoise, noise: Noise, t: Tensor, row: Tensor, state: State) -> tuple[State, Tensor]:
    """A reverse diffusion step from t[0], and a Langevin step at each of the times after it."""
    (x,) = state
    a, b, c, to_x0, to_x, epsilon, least = row.unbind()
    d = x[0].numel()
    x0 = denoise(x, t[0])
    x = a * x + b * x0 + c * noise(x)
    for s in t[1:]:
        g = to_x0 * denoise(x, s) - to_x * x  # the score at s
        size = epsilon * d / g.flatten(1).norm(dim=1).mean().square().maximum(least * d)
        x = x + size * g + (2.0 * size).sqrt() * noise(x)
    return (x,), x0


def _reverse(
    scale: Tensor, var_ts: Tensor, alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of x_t, x0_hat and z in x_s = scale x_t + var_ts score + sqrt(var_ts) z.

    Two steps have no such form and are the exact conditional law given x0_hat instead, alpha_s x0_hat + sigma_s z:
    from (almost) pure noise, where x_t tells nothing, and to sigma = 0 (the last step of appendix G).
    """
    at_end = too_long(alpha_t, sigma_t, alpha_s, sigma_s) | (sigma_s == 0)
    share = var_ts / sigma_t**2
    from_x_t = torch.where(at_end, 0.0, scale - share)
    from_x0 = torch.where(at_end, alpha_s, alpha_t * share)
    return from_x_t, from_x0, torch.where(at_end, sigma_s, var_ts.sqrt())


PLANS: dict[str, Callable[..., Plan]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "euler-ancestral": euler_ancestral,
    "euler-maruyama": euler_maruyama,
    "predictor-corrector": predictor_corrector,
    "dpmpp-2m": multistep.dpmpp_2m,
    "dpmpp-3m": multistep.dpmpp_3m,
    "dpmpp-2m-sde": multistep.dpmpp_2m_sde,
    "unipc": multistep.unipc,
    "consistency": consistency,
    "flow-map": flow_map,
}


def _sampler(make: Callable[..., Plan]) -> Callable[..., Tensor]:
    """The public form of a sampler."""

    def sample(
        denoise: Denoise, schedule: Schedule, x_T: Tensor, ts: Tensor, *, clip_x0: bool = False,
        generator: torch.Generator | None = None, on_step: OnStep | None = None, **options: float | int | str,
    ) -> Tensor:  # fmt: skip
        steps = make(schedule, ts, **options)
        return plan.run(steps, clipping(denoise) if clip_x0 else denoise, x_T, generator=generator, on_step=on_step)

    sample.__doc__ = make.__doc__
    return sample


SAMPLERS: dict[str, Callable[..., Tensor]] = {name: _sampler(make) for name, make in PLANS.items()}


def clipping(denoise: Denoise) -> Denoise:
    """`denoise`, its estimates clamped to [-1, 1]."""
    return lambda x_t, *t: denoise(x_t, *t).clamp(-1.0, 1.0)


def own_options(name: str) -> dict[str, float | int | str]:
    """The options of a sampler beyond those that all have, with their defaults."""
    parameters = inspect.signature(PLANS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

"""Samplers: from noise to images with a denoiser.

A sampler is a plain function `f(denoise, schedule, x_T, ts, *, clip_x0=False, generator=None, on_step=None,
loop=eager_loop, **options) -> x_0`:

    denoise    `denoise(x_t, t) -> x0_hat`, (N, C, H, W) for a 0-dim float64 t
    x_T        (N, C, H, W), standard normal for variance-preserving schedules; the result has its dtype and device
    ts         (n + 1,) float64 descending times, ts[-1] = 0 for clean images: `schedule.grid(n)`
    clip_x0    clamp each x0_hat to [-1, 1]
    generator  source of the noise that stochastic samplers add, on the device of x_T
    on_step    called as on_step(i, x_t, x0_hat) after step i, for figures and progress
    loop       what runs the steps: `loops.eager_loop`, or one that replays a captured step
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.diffusion.base_schedule import Schedule
from fastdiff.diffusion.loops import Denoise, Loop, OnStep, clipping, eager_loop, run_linear, step_ends, transition
from fastdiff.diffusion.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, unipc
from fastdiff.diffusion.samplers_ode import euler, heun
from fastdiff.diffusion.samplers_sde import euler_maruyama, predictor_corrector
from fastdiff.errors import UserError


def ddpm(
    denoise: Denoise,
    schedule: Schedule,
    x_T: Tensor,
    ts: Tensor,
    *,
    variance: str = "fixed-small",
    clip_x0: bool = False,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    loop: Loop = eager_loop,
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
    alpha_t, sigma_t, alpha_s, sigma_s = step_ends(schedule, ts)
    # q(x_t | x_s) = N(alpha_ts x_s, var_ts), generalised from one step to any s < t.
    alpha_ts, var_ts = transition(alpha_t, sigma_t, alpha_s, sigma_s)
    # Posterior mean of q(x_s | x_t, x0), eq. 7: a weighted sum of x_t and x0.
    from_x_t = alpha_ts * sigma_s**2 / sigma_t**2
    from_x0 = alpha_s * var_ts / sigma_t**2
    std = (var_ts if variance == "fixed-large" else var_ts * sigma_s**2 / sigma_t**2).sqrt()
    std = torch.where(sigma_s > 0, std, 0.0)  # the last step returns the mean (algorithm 2, line 3)
    denoise = clipping(denoise, clip_x0)
    return run_linear(denoise, x_T, ts, from_x_t, [from_x0], std, generator=generator, on_step=on_step, loop=loop)


def ddim(
    denoise: Denoise,
    schedule: Schedule,
    x_T: Tensor,
    ts: Tensor,
    *,
    eta: float = 0.0,
    clip_x0: bool = False,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    loop: Loop = eager_loop,
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
    alpha_t, sigma_t, alpha_s, sigma_s = step_ends(schedule, ts)
    _, var_ts = transition(alpha_t, sigma_t, alpha_s, sigma_s)
    std = eta * sigma_s / sigma_t * var_ts.sqrt()
    # x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z, with eps = (x_t - alpha_t x0) / sigma_t.
    from_x_t = (sigma_s**2 - std**2).clamp(min=0.0).sqrt() / sigma_t
    from_x0 = alpha_s - alpha_t * from_x_t
    denoise = clipping(denoise, clip_x0)
    return run_linear(denoise, x_T, ts, from_x_t, [from_x0], std, generator=generator, on_step=on_step, loop=loop)


def euler_ancestral(
    denoise: Denoise,
    schedule: Schedule,
    x_T: Tensor,
    ts: Tensor,
    *,
    eta: float = 1.0,
    clip_x0: bool = False,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    loop: Loop = eager_loop,
) -> Tensor:
    """An Euler step to a noise level below that of s, then fresh noise up to it (k-diffusion's euler_ancestral).

    With rho = sigma / alpha and in x / alpha: rho_up = eta rho_s / rho_t sqrt(rho_t^2 - rho_s^2), and Euler goes down
    to rho_down = sqrt(rho_s^2 - rho_up^2). Multiplied by alpha_s these are the terms of DDIM's eq. 12: the samplers are
    one, and eta has one meaning in both. Only the default differs.

    Raises:
        UserError: eta outside [0, 1], or a bad grid.
    """
    return ddim(denoise, schedule, x_T, ts, eta=eta, clip_x0=clip_x0, generator=generator, on_step=on_step, loop=loop)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "euler-ancestral": euler_ancestral,
    "euler-maruyama": euler_maruyama,
    "predictor-corrector": predictor_corrector,
    "dpmpp-2m": dpmpp_2m,
    "dpmpp-3m": dpmpp_3m,
    "dpmpp-2m-sde": dpmpp_2m_sde,
    "unipc": unipc,
}

COMMON_OPTIONS = frozenset({"clip_x0", "generator", "on_step", "loop"})


def own_options(name: str) -> dict[str, float | int | str]:
    """The options of a sampler beyond those that all have, with their defaults."""
    parameters = inspect.signature(SAMPLERS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in COMMON_OPTIONS}


def evaluations(name: str, steps: int, *, corrector_steps: int = 1) -> int:
    """Network evaluations for each sample in `steps` steps down to t = 0."""
    if name == "heun":
        return 2 * steps - 1
    if name == "predictor-corrector":
        return steps + (steps - 1) * corrector_steps
    return steps

"""The probability-flow ODE solved from data to noise, and the exact likelihood that it gives (Song et al. 2021, D.2).

The ODE is integrated along the angle theta = atan(sigma / alpha), from 0 (clean) to pi / 2 (no signal), for the
rescaled y = x / k, k = sqrt(alpha^2 + sigma^2):

    dy / d theta = (cos(theta) y - x0_hat) / sin(theta)

which is finite everywhere except at sigma = 0, for any schedule. (From y = cos x0 + sin eps: dy / d theta =
cos eps_hat - sin x0_hat.) The density follows the instantaneous change of variables (eq. 39).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.diffusion.plan import Denoise, check_grid
from fastdiff.diffusion.schedule import Schedule
from fastdiff.errors import UserError

NOISE = -12.0  # a log-SNR below which there is nothing but noise: at -infinity the angle is only 0.0025 larger


def log_likelihood(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    ts: Tensor,
    *,
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(x) by the probability flow, with Hutchinson's estimate of the divergence (Song et al. 2021, eq. 39 and 40).

    Each step of the grid is one of the classical fourth-order Runge-Kutta method: 4 evaluations of the denoiser, and
    for each probe one backward pass through it. The probes are drawn once and kept for the whole path, as in the paper.

    Args:
        denoise: `denoise(x_t, t) -> x0_hat`, differentiable in x_t.
        x: (N, ...) what to measure, taken to be at the time ts[-1].
        ts: descending grid from the noisy end to a time above 0, as log p is infinitely steep at 0. ts[-1] is usually
            schedule.t_min, as in `likelihood_grid`.
        probes: random sign vectors v in the estimate v^T J v, whose error falls as 1 / sqrt(probes).
        generator: draws the probes, on the device of x.

    Returns:
        log p(x) in nats, (N,), and x_T, (N, ...), the latent of x; both in x's dtype.

    Raises:
        UserError: a bad grid, one that ends at 0, or probes below 1.
    """
    ts = check_grid(schedule, ts)
    if ts[-1] <= 0:
        raise UserError("a likelihood needs a grid that ends above t = 0; leave out the last time of schedule.grid(n).")
    if probes < 1:
        raise UserError(f"probes is {probes}, but must be at least 1.")
    alpha, sigma = schedule.alpha(ts), schedule.sigma(ts)
    theta, k = torch.atan2(sigma, alpha).flip(0), torch.hypot(alpha, sigma).flip(0)
    dims = x[0].numel()
    # E[v v^T] = I for random signs.
    v = torch.empty(probes, *x.shape, dtype=x.dtype, device=x.device).bernoulli_(0.5, generator=generator) * 2.0 - 1.0

    def slope(y: Tensor, angle: float) -> tuple[Tensor, Tensor]:
        """dy / d theta and its divergence, (N,)."""
        cos, sin = math.cos(angle), math.sin(angle)
        log_snr = torch.tensor(2.0 * math.log(max(cos, 0.0) / sin) if cos > 1e-12 else -math.inf, dtype=torch.float64)
        t = schedule.t_of_log_snr(log_snr)
        scale = math.hypot(float(schedule.alpha(t)), float(schedule.sigma(t)))
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            x0 = denoise(scale * y, t.to(y.device))
            trace = torch.zeros(len(y), dtype=y.dtype, device=y.device)
            for i in range(probes):
                (row,) = torch.autograd.grad(x0, y, v[i], retain_graph=i + 1 < probes)
                trace = trace + (row * v[i]).flatten(1).sum(1) / probes
        return (cos * y.detach() - x0.detach()) / sin, (cos * dims - trace) / sin

    y, growth = x / float(k[0]), torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for begin, end in zip(theta[:-1].tolist(), theta[1:].tolist(), strict=True):
        y, change = _runge_kutta(slope, y, begin, end - begin)
        growth = growth + change
    x_T = float(k[-1]) * y
    # log p(x) = log p_T(x_T) + log |d x_T / d x|, and x_T = k_T y(theta_T), x = k_0 y(theta_0).
    prior = -0.5 * (x_T / schedule.prior_std).square().flatten(1).sum(1)
    prior = prior - dims * (0.5 * math.log(2.0 * math.pi) + math.log(schedule.prior_std))
    return prior + growth + dims * math.log(float(k[-1] / k[0])), x_T


def likelihood_grid(schedule: Schedule, n: int) -> Tensor:
    """Times of n steps for `log_likelihood`, (n + 1,) float64: from t_max to t_min, even in log-SNR above NOISE."""
    t_max, t_min = (torch.tensor(t, dtype=torch.float64) for t in (schedule.t_max, schedule.t_min))
    first = max(float(schedule.log_snr(t_max)), NOISE)
    ts = schedule.t_of_log_snr(torch.linspace(first, float(schedule.log_snr(t_min)), n + 1, dtype=torch.float64))
    ts[0], ts[-1] = t_max, t_min
    return ts


LEVEL = 1 / 127.5  # width of a grey level in [-1, 1]


def bits_per_dim(log_p: Tensor, dims: int, *, scale: float = LEVEL) -> Tensor:
    """Bits for each of the `dims` numbers of an 8-bit image, from log p (N,) in nats of the image in [-1, 1].

    A density over grey levels is smaller by 127.5 in each dimension. The images must be dequantised, as `dequantize`
    does. With a scale of 1 they are bits of the density itself, as of latents.
    """
    return -log_p / (dims * math.log(2.0)) - math.log2(scale)


def dequantize(images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """uint8 images as floats in [-1, 1], each spread evenly over the width of its level (Theis et al. 2016)."""
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    return (images.float() + noise - 0.5) / 127.5 - 1.0


def _runge_kutta(
    slope: Callable[[Tensor, float], tuple[Tensor, Tensor]], y: Tensor, theta: float, step: float
) -> tuple[Tensor, Tensor]:
    """One classical Runge-Kutta step of dy / d theta = slope; also the integral of the divergence over it."""
    k1, d1 = slope(y, theta)
    k2, d2 = slope(y + 0.5 * step * k1, theta + 0.5 * step)
    k3, d3 = slope(y + 0.5 * step * k2, theta + 0.5 * step)
    k4, d4 = slope(y + step * k3, theta + step)
    return y + step / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4), step / 6.0 * (d1 + 2.0 * d2 + 2.0 * d3 + d4)

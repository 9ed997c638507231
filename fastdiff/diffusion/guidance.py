"""Guidance: away from what a network draws without being asked, towards what it draws when asked.

Every objective is affine in the network's output, so that guiding the estimate of x0 guides eps, v, score and velocity:

    x0_hat = other + w (asked - other)

With `other` the same network without its condition this is classifier-free guidance (Ho & Salimans 2022, eq. 6, whose w
is ours minus 1); with `other` a less trained network, autoguidance (Karras et al. 2024, eq. 3). w = 1 is the asked
estimate, w = 0 the other. Guided samples do not follow the density p_asked^w p_other^(1-w): its noised versions have
other scores than the guided one (tests/diffusion/test_guidance.py has two Gaussians as an example).
"""

import torch
from torch import Tensor

from fastdiff.diffusion.objectives import per_image
from fastdiff.diffusion.plan import Denoise
from fastdiff.diffusion.schedule import Schedule
from fastdiff.model_sections import Guidance


def guided(
    denoise_cond: Denoise, denoise_other: Denoise, schedule: Schedule, scale: float = 1.5,
    interval: tuple[float, float] | None = None,
) -> Denoise:  # fmt: skip
    """A denoiser led by the difference of two, `denoise(x_t, t) -> x0_hat`, of the same task, on `schedule`.

    Args:
        scale: w.
        interval: (lo, hi), guided only where lo < sigma / alpha <= hi (Kynkaanniemi et al. 2024); None: everywhere.

    Raises:
        UserError: a scale that is not finite, or an interval the wrong way round.
    """
    numbers = Guidance(scale, interval).numbers

    def denoise(x_t: Tensor, t: Tensor, *r: Tensor) -> Tensor:
        weight = guidance_weight(schedule, t, torch.tensor([numbers], dtype=torch.float64, device=x_t.device))
        return guide(denoise_cond(x_t, t, *r), denoise_other(x_t, t, *r), weight)

    return denoise


def guidance_weight(schedule: Schedule, t: Tensor, guidance: Tensor) -> Tensor:
    """w at time t (0-dim): the scale within the interval, 1 outside; (N,) for `Guidance.numbers` (N, 3)."""
    scale, low, high = guidance.unbind(1)
    rho = schedule.sigma(t) / schedule.alpha(t)
    return torch.where((low < rho) & (rho <= high), scale, 1.0)


def guide(asked: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """other + w (asked - other) for estimates (N, C, H, W) and w (N,) or (1,); exactly `asked` where w = 1."""
    w = per_image(weight, asked)
    return torch.where(w == 1, asked, other + w * (asked - other))

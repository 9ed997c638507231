"""Continuous schedules: the score SDEs, EDM and rectified flow."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.schedule import Schedule, result_dtype


class VPSchedule(Schedule):
    """The variance-preserving SDE, DDPM's limit of many steps: dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw, t in [0, 1].

    beta(t) = beta_min + t (beta_max - beta_min) and alpha = exp(-B(t) / 2), sigma^2 = 1 - exp(-B(t)), where
    B(t) = int_0^t beta = t^2 (beta_max - beta_min) / 2 + t beta_min (Song et al. 2021, eq. 11, 32 and 33).
    """

    name = "vp-sde"
    t_min = 1e-5  # Song et al. 2021, appendix C

    def __init__(self, *, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_min, self.slope = beta_min, beta_max - beta_min

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * self.slope

    def _integral(self, t: Tensor) -> Tensor:
        """B(t)."""
        return t * (self.beta_min + 0.5 * self.slope * t)

    def _t_of_integral(self, b: Tensor) -> Tensor:
        """The root of B(t) = b, free of cancellation for small b; 1 for all b above B(1)."""
        b = b.clamp(max=self.beta_min + 0.5 * self.slope)
        return 2.0 * b / (self.beta_min + (self.beta_min**2 + 2.0 * self.slope * b).sqrt())

    def _alpha(self, t: Tensor) -> Tensor:
        return (-0.5 * self._integral(t)).exp()

    def _sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()

    def _log_snr(self, t: Tensor) -> Tensor:
        return -torch.expm1(self._integral(t)).log()

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._t_of_integral(-F.logsigmoid(log_snr))  # alpha^2 = exp(-B) = sigmoid(log_snr)

    def _d_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t) * self._alpha(t)

    def _d_sigma(self, t: Tensor) -> Tensor:
        return 0.5 * self._beta(t) * self._alpha(t).square() / self._sigma(t)


class SubVPSchedule(VPSchedule):
    """The sub-VP SDE: VP's alpha, but sigma = 1 - alpha^2, without the root (Song et al. 2021, eq. 14 and 29).

    So alpha^2 + sigma^2 < 1 on the way, and the noise is never more than VP's.
    """

    name = "subvp-sde"

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def _log_snr(self, t: Tensor) -> Tensor:
        # alpha / sigma = exp(-B / 2) / (1 - exp(-B)) = 1 / (2 sinh(B / 2))
        return -2.0 * (2.0 * torch.sinh(0.5 * self._integral(t))).log()

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._t_of_integral(2.0 * torch.asinh(0.5 * (-0.5 * log_snr).exp()))

    def _d_sigma(self, t: Tensor) -> Tensor:
        return self._beta(t) * self._alpha(t).square()


class SigmaSchedule(Schedule):
    """Schedules whose time is the noise itself: alpha = 1 and sigma = t, from sigma_min to sigma_max.

    The network is given x_t / sqrt(1 + sigma^2) in place of x_t, whose scale grows up to sigma_max: for data in [-1, 1]
    its variance is at most 1. The noise level that it is told is 0..1000, even in ln sigma. (EDM's own, ln(sigma) / 4,
    spans less than 3, too little for sinusoids of at most 1 radian a unit, such as our embedding's.)
    """

    default_spacing = "karras"

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        self.t_min, self.t_max, self.prior_std = sigma_min, sigma_max, sigma_max

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _log_snr(self, t: Tensor) -> Tensor:
        return -2.0 * t.log()

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr).exp()

    def _d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _c_noise(self, t: Tensor) -> Tensor:
        return (t.log() - math.log(self.t_min)) * (1000.0 / math.log(self.t_max / self.t_min))

    def c_in(self, t: Tensor) -> Tensor:
        """1 / sqrt(1 + sigma^2)."""
        return (1.0 + t.double().square()).rsqrt().to(result_dtype(t))

    def time_at(self, fraction: Tensor) -> Tensor:
        """Evenly in ln sigma: sigma_min (sigma_max / sigma_min)^fraction (Song et al. 2021, eq. 30)."""
        return self.t_min * (self.t_max / self.t_min) ** fraction


class VESchedule(SigmaSchedule):
    """The variance-exploding SDE, with sigma for its time (Song et al. 2021, eq. 9; sigma from section C)."""

    name = "ve-sde"

    def __init__(self, *, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        super().__init__(sigma_min, sigma_max)


class EDMSchedule(SigmaSchedule):
    """sigma(t) = t, s(t) = 1 (Karras et al. 2022, table 1): noise levels of training are log-normal."""

    name = "edm"
    default_time_sampling = "log-normal"

    def __init__(self, *, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__(sigma_min, sigma_max)


class FlowSchedule(Schedule):
    """The straight path of rectified flow: x_t = (1 - t) x0 + t eps (Liu et al. 2023, eq. 1; their time runs backward).

    At t = 1 there is no signal left. The smallest time, 1 / 1000, has VP's log-SNR at its smallest time.
    """

    name = "flow"
    t_min = 1e-3

    def _alpha(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2.0 * (torch.log1p(-t) - t.log())

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr)

    def _d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def _d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

"""What all noise schedules share: their interface and sampling grids.

Notation, used throughout the project:

    x0      data, scaled to [-1, 1]
    eps     standard normal noise
    x_t     = alpha(t) * x0 + sigma(t) * eps            the noised data
    log-SNR = log(alpha(t)^2 / sigma(t)^2)              falls as t rises

A schedule owns its time domain. Time rises with noise, and t = 0 is the clean end: alpha(0) = 1, sigma(0) = 0.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fastdiff.errors import UserError

KARRAS_RHO = 7.0  # Karras et al. 2022, table 1
FEW_STEP_LEVEL, FEW_STEP_TOP = 0.821, 80.0  # sigma / alpha: Geng et al. 2024; EDM's noisiest


class Schedule(ABC):
    """alpha(t) and sigma(t), and all that follows from them.

    Methods take times of any shape and return that shape: float64 for float64 times, else float32. They compute in
    float64 whatever comes in, so that neither end suffers from cancellation in float32. A kind supplies the `_`
    methods, from float64 to float64.

    Attributes:
        name: its key in SCHEDULES.
        t_max: the noisiest time. alpha may be exactly 0 there; log-SNR is then -inf.
        t_min: the smallest time at which a network is evaluated, in training and in sampling.
        prior_std: standard deviation of the noise that sampling starts from, x_T = prior_std * z.
        default_spacing: of `grid`.
        default_time_sampling: what `times.sample_t` takes for "auto".
    """

    name: str
    t_max: float = 1.0
    t_min: float
    prior_std: float = 1.0
    default_spacing: str = "trailing"
    default_time_sampling: str = "uniform"

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _log_snr(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """For any log-SNR; the caller clamps the result to [0, t_max]."""

    @abstractmethod
    def _d_alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _d_sigma(self, t: Tensor) -> Tensor: ...

    def _c_noise(self, t: Tensor) -> Tensor:
        return 1000.0 * t

    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at t."""
        return self._alpha(t.double()).to(result_dtype(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale at t."""
        return self._sigma(t.double()).to(result_dtype(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at t: +inf at t = 0, -inf where alpha = 0."""
        return self._log_snr(t.double()).to(result_dtype(t))

    def t_of_log_snr(self, log_snr: Tensor, *, clamp: bool = True) -> Tensor:
        """The time at which the log-SNR is this, clamped to [0, t_max]: the inverse of `log_snr`.

        Without the clamp rounding may lead out of the range a little, but there is a derivative at its ends.
        """
        t = self._t_of_log_snr(log_snr.double())
        return (t.clamp(0.0, self.t_max) if clamp else t).to(result_dtype(log_snr))

    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha / dt at t > 0."""
        return self._d_alpha(t.double()).to(result_dtype(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma / dt at t > 0."""
        return self._d_sigma(t.double()).to(result_dtype(t))

    def drift(self, t: Tensor) -> Tensor:
        """f(t) = d log alpha / dt of the SDE dx = f x dt + g dw that has these marginals, t > 0; -inf at alpha = 0."""
        t64 = t.double()
        return (self._d_alpha(t64) / self._alpha(t64)).to(result_dtype(t))

    def diffusion_squared(self, t: Tensor) -> Tensor:
        """g(t)^2 = d sigma^2 / dt - 2 f sigma^2 of the same SDE (Kingma et al. 2021, appendix), at t > 0."""
        t64 = t.double()
        sigma = self._sigma(t64)
        f = self._d_alpha(t64) / self._alpha(t64)
        return (2.0 * sigma * (self._d_sigma(t64) - f * sigma)).to(result_dtype(t))

    def c_noise(self, t: Tensor) -> Tensor:
        """The number that the network is given for t, in about 0..1000, the range that its embedding resolves."""
        return self._c_noise(t.double()).to(result_dtype(t))

    def c_in(self, t: Tensor) -> Tensor:
        """What x_t is multiplied by before a network sees it.

        1 where alpha and sigma are at most 1, so that the network sees x_t as in the papers. Schedules of growing
        variance override it.
        """
        return torch.ones_like(t, dtype=result_dtype(t))

    def time_at(self, fraction: Tensor) -> Tensor:
        """The time at a fraction (float64, in [0, 1]) of the way from t_min to t_max, as the schedule's paper walks."""
        return self.t_min + fraction * (self.t_max - self.t_min)

    def uniform_t(self, n: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """n independent times (n,), uniform over the time axis, drawn on `device`."""
        return self.time_at(torch.rand(n, generator=generator, device=device, dtype=torch.float64))

    def training_t(self, t: Tensor) -> Tensor:
        """The nearest times that training uses: t itself; on discrete schedules whole times, int64."""
        return t

    def grid(self, n: int, *, spacing: str = "auto", last_level: float = FEW_STEP_LEVEL) -> Tensor:
        """The times of an n-step sampler: (n + 1,) float64, descending from t_max (`leading`: from below it) to 0.

        Args:
            n: steps, at least 1.
            spacing: of the first n times; the last is always 0.
                `trailing`: t_max, down by t_max / n (Lin et al. 2024, table 2).
                `leading`: discrete schedules only: 1 + floor(i T / n) for i < n, so that it ends at 1 and starts about
                    T / n below T (Song et al. 2021, appendix D.2: "linear").
                `uniform`: from t_max to t_min, evenly in t.
                `karras`: from t_max to t_min, evenly in (sigma / alpha)^(1/7) (Karras et al. 2022, eq. 5).
                `log-snr`: from t_max to t_min, evenly in log-SNR (Lu et al. 2022, section 3.3).
                `few-step`: from t_max to sigma / alpha = last_level, evenly in (sigma / alpha)^(1/7); where t_max lies
                    above 80 the others are as from 80.
                `auto`: `default_spacing`.
            last_level: sigma / alpha at the start of the last step, of spacing few-step; n = 1 has only t_max.

        Raises:
            UserError: n below 1, an unknown spacing, or one that this schedule does not have; or a last_level that is
                not above 0 and below the noisiest level.
        """
        spacing = self.default_spacing if spacing == "auto" else spacing
        if n < 1:
            raise UserError(f"{n} sampling steps were asked for, but there must be at least 1.")
        if spacing == "trailing":
            times = torch.arange(n, 0, -1, dtype=torch.float64) * (self.t_max / n)
        elif spacing == "uniform":
            times = torch.linspace(self.t_max, self.t_min, n, dtype=torch.float64)
        elif spacing in ("karras", "log-snr"):
            times = self._grid_in_log_snr(n, spacing)
        elif spacing == "few-step":
            times = self._few_step_grid(n, last_level)
        elif spacing == "leading":
            raise UserError(f"spacing leading is for discrete schedules; with {self.name} choose trailing or uniform.")
        else:
            raise UserError(
                f"spacing {spacing!r} is unknown; choose trailing, leading, uniform, karras, log-snr or few-step."
            )
        times[0] = self.t_max  # exactly, whatever rounding did
        return torch.cat([times, times.new_zeros(1)])

    def _few_step_grid(self, n: int, last_level: float) -> Tensor:
        """n times from t_max, at most sigma / alpha = FEW_STEP_TOP in the spacing, to last_level."""
        noisiest = (-0.5 * self._log_snr(torch.tensor(self.t_max, dtype=torch.float64))).exp().item()
        top = min(noisiest, FEW_STEP_TOP)
        if not 0 < last_level < top:
            raise UserError(
                f"--last-level is {last_level:g}, but must lie above 0 and below {top:.3g}, a level of sigma / alpha."
            )
        roots = torch.linspace(top ** (1 / KARRAS_RHO), last_level ** (1 / KARRAS_RHO), n, dtype=torch.float64)
        return self.t_of_log_snr(-2 * KARRAS_RHO * roots.log())

    def _grid_in_log_snr(self, n: int, spacing: str) -> Tensor:
        """n times from t_max to t_min. Raises UserError where the log-SNR at t_max is infinite."""
        first, last = self._log_snr(torch.tensor([self.t_max, self.t_min], dtype=torch.float64)).tolist()
        if first == -float("inf"):
            raise UserError(
                f"spacing {spacing} needs some signal at the noisiest time, but {self.name} has none there; "
                "choose trailing or uniform."
            )
        if spacing == "log-snr":
            log_snr = torch.linspace(first, last, n, dtype=torch.float64)
        else:  # sigma / alpha = e^(-log_snr / 2), so its rho-th root is e^(-log_snr / (2 rho))
            ends = torch.tensor([first, last], dtype=torch.float64).div(-2 * KARRAS_RHO).exp().tolist()
            log_snr = -2 * KARRAS_RHO * torch.linspace(ends[0], ends[1], n, dtype=torch.float64).log()
        times = self.t_of_log_snr(log_snr)
        if n > 1:
            times[-1] = self.t_min
        return times


def result_dtype(t: Tensor) -> torch.dtype:
    """float64 for float64 times, float32 for all others."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32

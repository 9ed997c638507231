"""Noise schedules: how much signal and how much noise there is at time t.

Notation, used throughout the project:

    x0      data, scaled to [-1, 1]
    eps     standard normal noise
    x_t     = alpha(t) * x0 + sigma(t) * eps            the noised data
    log-SNR = log(alpha(t)^2 / sigma(t)^2)              falls as t rises

A schedule owns its time domain. Time rises with noise, and t = 0 is the clean end: alpha(0) = 1, sigma(0) = 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.errors import UserError


class DiscreteSchedule:
    """A variance-preserving schedule over t in {0, 1..T}, given by its betas.

    alpha(t)^2 = alpha_bar_t = prod_{s <= t} (1 - beta_s) and sigma(t)^2 = 1 - alpha_bar_t (Ho et al. 2020, eq. 4).
    t = 0 is clean data. Between whole times, log alpha_bar is interpolated linearly.

    Args:
        betas: (T,) float64, each in (0, 1); `betas[t - 1]` is the variance that step t adds.
    """

    def __init__(self, betas: Tensor) -> None:
        if betas.ndim != 1 or betas.dtype != torch.float64:
            raise ValueError(f"betas must be a 1-D float64 tensor, got {betas.dtype} of shape {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must lie in (0, 1)")
        self.T = len(betas)
        log_alpha_bar = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])
        self._tables = {betas.device: log_alpha_bar}

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:  # one upload for each device, so that a training step never waits for one
            self._tables[device] = next(iter(self._tables.values())).to(device)
        return self._tables[device]

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """log alpha_bar at t (any shape, values in [0, T]), always float64."""
        table = self._table(t.device)
        if not t.is_floating_point():
            return table[t]
        below = t.floor().clamp(0, self.T - 1).long()
        return torch.lerp(table[below], table[below + 1], t.double() - below)

    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at t: same shape; float64 for float64 t, else float32."""
        return (0.5 * self.log_alpha_bar(t)).exp().to(_result_dtype(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale at t: same shape; float64 for float64 t, else float32."""
        return (-torch.expm1(self.log_alpha_bar(t))).sqrt().to(_result_dtype(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at t: same shape; +inf at t = 0; float64 for float64 t, else float32."""
        log_alpha_bar = self.log_alpha_bar(t)
        return (log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))).to(_result_dtype(t))

    def c_noise(self, t: Tensor) -> Tensor:
        """What the network is given for t: the index t - 1 in [0, T - 1], float32 (float64 for float64 t)."""
        return (t - 1).to(_result_dtype(t))

    def sample_t(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """n training times, uniform over {1..T}: (n,) int64 on `device`, drawn there (no transfer, no sync)."""
        t = torch.randint(1, self.T + 1, (n,), generator=generator, device=device)
        self._table(t.device)  # here, outside of what is compiled or captured
        return t

    def grid(self, n: int, *, spacing: str = "trailing") -> Tensor:
        """The times of an n-step sampler: (n + 1,) float64, descending whole numbers that end in 0.

        Args:
            n: network evaluations, in 1..T.
            spacing: `trailing` starts at T and steps down by T / n (Lin et al. 2024, table 2); `leading` ends at 1 in
                strides of T // n, so that it starts below T (the choice of DDIM's code).

        Raises:
            UserError: n outside 1..T, or an unknown spacing.
        """
        if not 1 <= n <= self.T:
            raise UserError(f"{n} sampling steps were asked for, but this schedule allows 1 to {self.T}.")
        if spacing == "trailing":
            times = torch.arange(n, 0, -1, dtype=torch.float64).mul(self.T / n).round()
        elif spacing == "leading":
            times = 1.0 + torch.arange(n - 1, -1, -1, dtype=torch.float64) * (self.T // n)
        else:
            raise UserError(f"spacing {spacing!r} is unknown; choose trailing or leading.")
        return torch.cat([times, times.new_zeros(1)])


def _result_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def ddpm_linear(T: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
    """Betas rise linearly from beta_start to beta_end (Ho et al. 2020, section 4). Raises UserError for T < 1."""
    return DiscreteSchedule(torch.linspace(beta_start, beta_end, _checked(T), dtype=torch.float64))


def cosine(T: int = 1000, *, s: float = 0.008, beta_max: float = 0.999) -> DiscreteSchedule:
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t / T + s) / (1 + s) * pi / 2) (Nichol & Dhariwal 2021, eq. 17).

    Betas are clipped at beta_max, so that alpha_bar_T stays above 0. Raises UserError for T < 1.
    """
    f = torch.cos((torch.arange(_checked(T) + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2).square()
    return DiscreteSchedule((1 - f[1:] / f[:-1]).clamp(max=beta_max))


def _checked(T: int) -> int:
    if T < 1:
        raise UserError(f"T is {T}, but a schedule needs at least 1 step.")
    return T


SCHEDULES: dict[str, Callable[..., DiscreteSchedule]] = {"ddpm-linear": ddpm_linear, "cosine": cosine}

"""Discrete, variance-preserving schedules: T noise levels, given by their betas."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.schedule import FEW_STEP_LEVEL, Schedule
from fastdiff.errors import UserError


class DiscreteSchedule(Schedule):
    """A variance-preserving schedule over t in {0, 1..T}, given by its betas.

    alpha(t)^2 = alpha_bar_t = prod_{s <= t} (1 - beta_s) and sigma(t)^2 = 1 - alpha_bar_t (Ho et al. 2020, eq. 4).
    t = 0 is clean data. Between whole times, log alpha_bar is interpolated linearly; alpha itself is in the last
    interval of a schedule that ends at alpha = 0.

    Args:
        betas: (T,) float64, each in (0, 1); the last may be 1. `betas[t - 1]` is the variance that step t adds.
        name: its key in SCHEDULES.
    """

    t_min = 1.0

    def __init__(self, betas: Tensor, name: str = "discrete") -> None:
        if betas.ndim != 1 or betas.dtype != torch.float64:
            raise ValueError(f"betas must be a 1-D float64 tensor, got {betas.dtype} of shape {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas < 1))[:-1].all() and 0 < betas[-1] <= 1):
            raise ValueError("betas must lie in (0, 1); the last may be 1")
        self.name = name
        self.T = len(betas)
        self.t_max = float(self.T)
        self.ends_at_zero = bool(betas[-1] == 1)
        log_alpha_bar = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])
        self._tables = {betas.device: log_alpha_bar}

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:  # one upload for each device, so that a training step never waits for one
            self._tables[device] = next(iter(self._tables.values())).to(device)
        return self._tables[device]

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """log alpha_bar at t (any shape, values in [0, T]), always float64."""
        t, table = t.double(), self._table(t.device)
        below = t.floor().clamp(0, self.T - 1).long()
        # take: for an index without dimensions the host would wait, which no captured step may.
        at, above = table.take(below), table.take(below + 1)
        value = torch.lerp(at, above, t - below)
        if not self.ends_at_zero:
            return value
        # alpha = (T - t) alpha_{T-1}, where log alpha_bar would be interpolated with -inf.
        return torch.where(below == self.T - 1, at + 2.0 * (self.T - t).log(), value)

    def _alpha(self, t: Tensor) -> Tensor:
        return (0.5 * self.log_alpha_bar(t)).exp()

    def _sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(self.log_alpha_bar(t))).sqrt()

    def _log_snr(self, t: Tensor) -> Tensor:
        log_alpha_bar = self.log_alpha_bar(t)
        return log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        table = self._table(log_snr.device)
        log_alpha_bar = F.logsigmoid(log_snr)  # alpha^2 + sigma^2 = 1
        # The interval in which log alpha_bar is passed on its way down.
        below = torch.searchsorted(-table, -log_alpha_bar, right=True).sub(1).clamp(0, self.T - 1)
        drop = table[below] - log_alpha_bar
        t = below + drop / (table[below] - table[below + 1])
        if not self.ends_at_zero:
            return t
        return torch.where(below == self.T - 1, self.T - (-0.5 * drop).exp(), t)

    def _d_alpha(self, t: Tensor) -> Tensor:
        """From the left, the side to which a sampler steps."""
        table = self._table(t.device)
        below = t.ceil().sub(1).clamp(0, self.T - 1).long()
        d_alpha = 0.5 * (table[below + 1] - table[below]) * self._alpha(t)
        if not self.ends_at_zero:
            return d_alpha
        return torch.where(below == self.T - 1, -(0.5 * table[self.T - 1]).exp(), d_alpha)

    def _d_sigma(self, t: Tensor) -> Tensor:
        return -self._alpha(t) * self._d_alpha(t) / self._sigma(t)  # alpha^2 + sigma^2 = 1

    def _c_noise(self, t: Tensor) -> Tensor:
        # The index 0..T-1 that DDPM's networks are given; of more than 1000 levels, in the same range.
        return (t - 1.0) * min(1.0, 1000.0 / self.T)

    def time_at(self, fraction: Tensor) -> Tensor:
        """Whole times: each of 1..T covers 1 / T of the fractions."""
        return (fraction * self.T).ceil().clamp(1, self.T)

    def uniform_t(self, n: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """See `Schedule.uniform_t`; int64 in {1..T}."""
        return torch.randint(1, self.T + 1, (n,), generator=generator, device=device)

    def training_t(self, t: Tensor) -> Tensor:
        """See `Schedule.training_t`."""
        self._table(t.device)  # here, outside of what is compiled or captured
        return t.round().long() if t.is_floating_point() else t

    def grid(self, n: int, *, spacing: str = "auto", last_level: float = FEW_STEP_LEVEL) -> Tensor:
        """See `Schedule.grid`. `trailing` and `leading` give whole times, at most T of them; others lie between."""
        spacing = self.default_spacing if spacing == "auto" else spacing
        if spacing not in ("trailing", "leading"):
            return super().grid(n, spacing=spacing, last_level=last_level)
        if not 1 <= n <= self.T:
            raise UserError(
                f"{n} sampling steps were asked for, but spacing {spacing} of {self.name} allows 1 to {self.T}."
            )
        if spacing == "leading":  # whole numbers until the floor, so that nothing is rounded across one
            times = 1.0 + (torch.arange(n - 1, -1, -1, dtype=torch.float64) * self.T / n).floor()
            return torch.cat([times, times.new_zeros(1)])
        return super().grid(n, spacing=spacing).round()


def ddpm_linear(
    T: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02, zero_terminal_snr: bool = False
) -> DiscreteSchedule:
    """Betas rise linearly from beta_start to beta_end (Ho et al. 2020, section 4). Raises UserError for T < 1."""
    betas = torch.linspace(beta_start, beta_end, _checked(T), dtype=torch.float64)
    return DiscreteSchedule(rescaled(betas) if zero_terminal_snr else betas, "ddpm-linear")


def cosine(
    T: int = 1000, *, s: float = 0.008, beta_max: float = 0.999, zero_terminal_snr: bool = False
) -> DiscreteSchedule:
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t / T + s) / (1 + s) * pi / 2) (Nichol & Dhariwal 2021, eq. 17).

    Betas are clipped at beta_max, so that alpha_bar_T stays above 0. Raises UserError for T < 1.
    """
    f = torch.cos((torch.arange(_checked(T) + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2).square()
    betas = (1 - f[1:] / f[:-1]).clamp(max=beta_max)
    return DiscreteSchedule(rescaled(betas) if zero_terminal_snr else betas, "cosine")


def rescaled(betas: Tensor) -> Tensor:
    """Betas (T,) with alpha_T = 0 and alpha_1 as before: alpha is shifted and scaled (Lin et al. 2024, algorithm 1)."""
    if len(betas) == 1:
        return torch.ones_like(betas)
    alpha = (0.5 * torch.log1p(-betas).cumsum(0)).exp()
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    alpha_bar = torch.cat([alpha.new_ones(1), alpha.square()])
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def _checked(T: int) -> int:
    if T < 1:
        raise UserError(f"T is {T}, but a schedule needs at least 1 step.")
    return T

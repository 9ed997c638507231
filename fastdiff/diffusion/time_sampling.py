"""Which noise levels a training step sees: the distribution of t.

Each entry of TIME_SAMPLINGS is `f(schedule, n, generator, device) -> t`, (n,) float64 on `device`, drawn there with no
sync. A schedule turns fractions of its time axis into times by `time_at`, and log-SNRs by `t_of_log_snr`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff.errors import UserError

if TYPE_CHECKING:
    from fastdiff.diffusion.base_schedule import Schedule

P_MEAN, P_STD = -1.2, 1.2  # of log sigma; Karras et al. 2022, table 1


def uniform(schedule: Schedule, n: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """Independent times, uniform over the schedule's time axis (for VE and EDM that of log sigma)."""
    return schedule.time_at(torch.rand(n, generator=generator, device=device, dtype=torch.float64))


def low_discrepancy(
    schedule: Schedule, n: int, generator: torch.Generator | None, device: torch.device | str
) -> Tensor:
    """One uniform offset, and one time in each n-th of the time axis: u_i = mod(u_0 + i / n, 1).

    Each time alone is uniform, but the batch covers all noise levels, so that its mean loss varies less
    (Kingma et al. 2021, appendix I.1).
    """
    offset = torch.rand(1, generator=generator, device=device, dtype=torch.float64)
    return schedule.time_at((offset + torch.arange(n, device=device, dtype=torch.float64) / n) % 1.0)


def log_normal(schedule: Schedule, n: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """ln(sigma / alpha) ~ N(-1.2, 1.2^2) (Karras et al. 2022, table 1), clamped to [t_min, t_max]."""
    log_ratio = P_MEAN + P_STD * torch.randn(n, generator=generator, device=device, dtype=torch.float64)
    return schedule.t_of_log_snr(-2.0 * log_ratio).clamp(schedule.t_min, schedule.t_max)


def logit_normal(schedule: Schedule, n: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """t = sigmoid(z), z ~ N(0, 1): more of the middle (Esser et al. 2024, eq. 19), as a fraction of the time axis.

    Raises:
        UserError: a schedule whose time is sigma, which has no middle.
    """
    if schedule.prior_std != 1.0:
        raise UserError(
            f"time sampling logit-normal needs a time in [0, 1], but that of {schedule.name} is sigma; "
            "choose log-normal, uniform or low-discrepancy."
        )
    z = torch.randn(n, generator=generator, device=device, dtype=torch.float64)
    return schedule.time_at(torch.sigmoid(z))


TIME_SAMPLINGS: dict[str, Callable[[Schedule, int, torch.Generator | None, torch.device | str], Tensor]] = {
    "uniform": uniform,
    "low-discrepancy": low_discrepancy,
    "log-normal": log_normal,
    "logit-normal": logit_normal,
}

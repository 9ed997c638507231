"""Which noise levels a training step sees: the distribution of t.

Each entry of TIME_SAMPLINGS is `f(schedule, n, generator, device) -> t`, (n,) on `device`, drawn there with no sync.
A schedule turns fractions of its time axis into times by `time_at`, and log-SNRs by `t_of_log_snr`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.diffusion.schedule import FEW_STEP_TOP, Schedule
from fastdiff.errors import UserError

P_MEAN, P_STD = -1.2, 1.2  # of log sigma; Karras et al. 2022, table 1
WIDE_MEAN, WIDE_STD = -1.1, 2.0  # Geng et al. 2024, which trains one step from the noisiest time as well


def uniform(schedule: Schedule, n: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """Independent times, uniform over the schedule's time axis (log sigma for VE and EDM)."""
    return schedule.uniform_t(n, generator, device)


def low_discrepancy(
    schedule: Schedule, n: int, generator: torch.Generator | None, device: torch.device | str
) -> Tensor:
    """One uniform offset, and one time in each n-th of the time axis: u_i = mod(u_0 + i / n, 1).

    Each time alone is uniform, but the batch covers all noise levels, so that its mean loss varies less
    (Kingma et al. 2021, appendix I.1).
    """
    offset = torch.rand(1, generator=generator, device=device, dtype=torch.float64)
    return schedule.time_at((offset + torch.arange(n, device=device, dtype=torch.float64) / n) % 1.0)


def log_normal(
    schedule: Schedule, n: int, generator: torch.Generator | None, device: torch.device | str,
    *, mean: float = P_MEAN, std: float = P_STD,
) -> Tensor:  # fmt: skip
    """ln(sigma / alpha) ~ N(mean, std^2) (Karras et al. 2022, table 1), clamped to [t_min, t_max]."""
    log_ratio = mean + std * torch.randn(n, generator=generator, device=device, dtype=torch.float64)
    return schedule.t_of_log_snr(-2.0 * log_ratio).clamp(schedule.t_min, schedule.t_max)


def wide_log_normal(
    schedule: Schedule, n: int, generator: torch.Generator | None, device: torch.device | str
) -> Tensor:
    """ln(sigma / alpha) ~ N(-1.1, 2^2) (Geng et al. 2024); levels above 80 are t_max, where a single step starts."""
    t = log_normal(schedule, n, generator, device, mean=WIDE_MEAN, std=WIDE_STD)
    return torch.where(schedule.log_snr(t) < -2.0 * math.log(FEW_STEP_TOP), schedule.t_max, t)


def logit_normal(schedule: Schedule, n: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """t = sigmoid(z), z ~ N(0, 1): more of the middle (Esser et al. 2024, eq. 19), as a fraction of the time axis.

    Raises:
        UserError: a schedule whose time is sigma, which has no middle.
    """
    if schedule.prior_std != 1.0:
        raise UserError(
            f"time sampling logit-normal needs a time in [0, 1], but the time of {schedule.name} is sigma; "
            "choose log-normal, uniform or low-discrepancy."
        )
    z = torch.randn(n, generator=generator, device=device, dtype=torch.float64)
    return schedule.time_at(torch.sigmoid(z))


TIME_SAMPLINGS: dict[str, Callable[[Schedule, int, torch.Generator | None, torch.device | str], Tensor]] = {
    "uniform": uniform,
    "low-discrepancy": low_discrepancy,
    "log-normal": log_normal,
    "wide-log-normal": wide_log_normal,
    "logit-normal": logit_normal,
}


def sample_t(
    schedule: Schedule,
    n: int,
    sampling: str = "auto",
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """n training times (n,) in [t_min, t_max] on `device`, drawn there (no transfer, no sync).

    Args:
        sampling: a name in TIME_SAMPLINGS, or `auto`: the schedule's own.

    Returns:
        float64; discrete schedules: int64.

    Raises:
        UserError: an unknown name, or one that this schedule does not have.
    """
    sampling = schedule.default_time_sampling if sampling == "auto" else sampling
    if sampling not in TIME_SAMPLINGS:
        raise UserError(f"time sampling {sampling!r} is unknown; choose one of auto, {', '.join(TIME_SAMPLINGS)}.")
    return schedule.training_t(TIME_SAMPLINGS[sampling](schedule, n, generator, device))

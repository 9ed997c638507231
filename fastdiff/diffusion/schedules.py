"""The table of noise schedules. `schedule` states their notation and interface."""

from collections.abc import Callable

import torch

from fastdiff.diffusion.continuous import EDMSchedule, FlowSchedule, SubVPSchedule, VESchedule, VPSchedule
from fastdiff.diffusion.discrete import DiscreteSchedule, cosine, ddpm_linear
from fastdiff.diffusion.schedule import Schedule
from fastdiff.errors import UserError

# Of alpha^2 / sigma^2 at t_max. As designed, all schedules end below it: ve-sde at 4e-4, ddpm-linear at 4e-5.
LARGEST_TERMINAL_SNR = 1e-3

DISCRETE: dict[str, Callable[..., DiscreteSchedule]] = {"ddpm-linear": ddpm_linear, "cosine": cosine}
CONTINUOUS: dict[str, Callable[..., Schedule]] = {
    kind.name: kind for kind in (VPSchedule, SubVPSchedule, VESchedule, EDMSchedule, FlowSchedule)
}
SCHEDULES: dict[str, Callable[..., Schedule]] = {**DISCRETE, **CONTINUOUS}


def make_schedule(name: str, *, timesteps: int = 1000, zero_terminal_snr: bool = False) -> Schedule:
    """Build a schedule by its name in SCHEDULES.

    Args:
        timesteps: T of discrete schedules; others have none.
        zero_terminal_snr: rescale a discrete schedule so that alpha(T) = 0.

    Raises:
        UserError: an unknown name, timesteps < 1, or a continuous schedule that cannot be rescaled.
    """
    if name not in SCHEDULES:
        raise UserError(f"schedule {name!r} is unknown; choose one of {', '.join(SCHEDULES)}.")
    if name in DISCRETE:
        return DISCRETE[name](timesteps, zero_terminal_snr=zero_terminal_snr)
    if zero_terminal_snr:
        raise UserError(f"--zero-terminal-snr rescales {' and '.join(DISCRETE)}; drop it for schedule {name}.")
    return CONTINUOUS[name]()


def unnoised_end(schedule: Schedule) -> str | None:
    """A warning where the forward process keeps part of the image to its end, but sampling starts from pure noise."""
    t = torch.tensor(schedule.t_max, dtype=torch.float64)
    snr = schedule.log_snr(t).exp().item()
    if snr <= LARGEST_TERMINAL_SNR:
        return None
    end = f"{schedule.name} with T = {schedule.t_max:g}" if schedule.name in DISCRETE else schedule.name
    return (
        f"{end} does not end in noise: x_T keeps {schedule.alpha(t).item():.2g} of the image (SNR {snr:.2g}), but "
        "sampling starts from noise alone, so samples will be poor. Train with --zero-terminal-snr (not for eps and "
        "score), --schedule cosine, or more --timesteps."
    )

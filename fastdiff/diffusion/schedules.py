"""The table of noise schedules. `base_schedule` states their notation and interface."""

from collections.abc import Callable

from fastdiff.diffusion.base_schedule import Schedule
from fastdiff.diffusion.continuous import EDMSchedule, FlowSchedule, SubVPSchedule, VESchedule, VPSchedule
from fastdiff.diffusion.discrete import DiscreteSchedule, cosine, ddpm_linear
from fastdiff.errors import UserError

__all__ = ["SCHEDULES", "DiscreteSchedule", "Schedule", "make_schedule"]

DISCRETE: dict[str, Callable[..., DiscreteSchedule]] = {"ddpm-linear": ddpm_linear, "cosine": cosine}
CONTINUOUS: dict[str, Callable[..., Schedule]] = {
    kind.name: kind for kind in (VPSchedule, SubVPSchedule, VESchedule, EDMSchedule, FlowSchedule)
}
SCHEDULES: dict[str, Callable[..., Schedule]] = {**DISCRETE, **CONTINUOUS}


def make_schedule(name: str, *, timesteps: int = 1000, zero_terminal_snr: bool = False) -> Schedule:
    """Build a schedule by its name.

    Args:
        name: a key of SCHEDULES.
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

"""Objectives: what the network predicts, and how its error is weighted.

A network is called as `model(x_in, c_noise, **cond)` and knows nothing of this file. An objective turns its output
into a loss for training and into an estimate of x0 for sampling; samplers see that estimate alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.diffusion.schedules import SCHEDULES, DiscreteSchedule
from fastdiff.errors import UserError

Model = Callable[..., Tensor]

# log-SNR (N,) -> weight (N,) of the objective's own squared error.
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {"uniform": torch.ones_like}


def per_image(scale: Tensor, x: Tensor) -> Tensor:
    """Shape a per-image number (N,) so that it multiplies x (N, ...), in x's dtype."""
    return scale.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


class Objective(ABC):
    """Base of all objectives; a kind supplies `target` and `to_x0`.

    Args:
        schedule: the noise schedule, which also draws the training times.
        weighting: a name in WEIGHTINGS.

    Raises:
        UserError: an unknown weighting.
    """

    def __init__(self, schedule: DiscreteSchedule, weighting: str = "uniform") -> None:
        if weighting not in WEIGHTINGS:
            raise UserError(f"weighting {weighting!r} is unknown; choose one of {', '.join(WEIGHTINGS)}.")
        self.schedule = schedule
        self.weight = WEIGHTINGS[weighting]

    def sample_t(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """n training times (n,) on `device`, by the schedule's own distribution."""
        return self.schedule.sample_t(n, generator=generator, device=device)

    @abstractmethod
    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should put out for x_t, (N, C, H, W)."""

    @abstractmethod
    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of x0 that a network output implies, (N, C, H, W)."""

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps: (N, C, H, W) for t (N,) (Ho et al. 2020, eq. 4)."""
        return per_image(self.schedule.alpha(t), x0) * x0 + per_image(self.schedule.sigma(t), x0) * eps

    def loss(self, model: Model, x0: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        """Weighted squared error of each image, averaged over its elements.

        Args:
            model: `model(x_t, t, **cond)`.
            x0: (N, C, H, W) in [-1, 1].
            t: (N,) times from `sample_t`.
            eps: (N, C, H, W) standard normal.

        Returns:
            (N,), in float32 also under autocast (float64 for float64 x0).
        """
        prediction = model(self.add_noise(x0, t, eps), self.schedule.c_noise(t), **cond)
        error = (prediction.to(x0.dtype) - self.target(x0, t, eps)).square().flatten(1).mean(1)
        return self.weight(self.schedule.log_snr(t)).to(error.dtype) * error

    def denoise(self, model: Model, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """The model's estimate of x0, (N, C, H, W), in the dtype of x_t.

        Args:
            x_t: (N, C, H, W).
            t: one time for all images (0-dim) or one for each (N,); above 0.
        """
        t = t.expand(len(x_t))
        prediction = model(x_t, self.schedule.c_noise(t), **cond)
        return self.to_x0(prediction.to(x_t.dtype), x_t, t)


class EpsObjective(Objective):
    """The network predicts the noise: L_simple (Ho et al. 2020, eq. 14)."""

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """eps itself."""
        return eps

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0 = (x_t - sigma eps) / alpha (Ho et al. 2020, below eq. 11)."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return (x_t - per_image(sigma, x_t) * prediction) / per_image(alpha, x_t)


OBJECTIVES: dict[str, type[Objective]] = {"eps": EpsObjective}


def make_objective(kind: str, *, schedule: str, timesteps: int, weighting: str) -> Objective:
    """Build an objective from the names of its parts. Raises UserError for a name that is not in its table."""
    if kind not in OBJECTIVES:
        raise UserError(f"objective {kind!r} is unknown; choose one of {', '.join(OBJECTIVES)}.")
    if schedule not in SCHEDULES:
        raise UserError(f"schedule {schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}.")
    return OBJECTIVES[kind](SCHEDULES[schedule](T=timesteps), weighting)

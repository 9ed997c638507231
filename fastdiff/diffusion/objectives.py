"""Objectives: what the network predicts.

A network is called as `model(x_in, c_noise, **cond)` and knows nothing of this file. An objective turns its output
into a loss for training and into an estimate of x0 for sampling; samplers see that estimate alone. How the errors are
weighted is in `weightings`.

Write p for the network's output. Every kind here is affine in it at given x_t, x0_hat = a(t) x_t + c(t) p, so that
||x0 - x0_hat||^2 = c^2 ||target - p||^2.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.schedule import Schedule, result_dtype
from fastdiff.diffusion.schedules import make_schedule
from fastdiff.diffusion.times import sample_t
from fastdiff.diffusion.weightings import WEIGHTINGS
from fastdiff.errors import UserError

Model = Callable[..., Tensor]

LARGEST_LOG_SNR = 60.0  # in weights: e^60 is finite in float32, and no schedule evaluates a network beyond 30


def per_image(scale: Tensor, x: Tensor) -> Tensor:
    """Shape a per-image number (N,) so that it multiplies x (N, ...), in x's dtype."""
    return scale.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


class Objective(ABC):
    """Base of all objectives; a kind supplies `target`, `to_x0` and `log_gain`, and may change `precondition`.

    Args:
        schedule: the noise schedule.
        weighting: a name in WEIGHTINGS.
        time_sampling: a name in TIME_SAMPLINGS, or `auto`: the schedule's own.
        min_snr_gamma: the largest weight of `min-snr`.
        sigma_data: standard deviation of the data, for the objective `edm` and the weighting `edm`.
        time_scale: factor of c_noise. Below 1 the network's output varies less between neighbouring times.

    Raises:
        UserError: an unknown weighting or time sampling, or a schedule that this kind or the time sampling cannot have.
    """

    needs_signal = False  # True if x0 cannot be recovered from the prediction where alpha = 0
    shares_dropout = False  # True if `loss` evaluates the network more than once, with one `dropout_seed` (1,) in cond

    def __init__(
        self,
        schedule: Schedule,
        weighting: str = "uniform",
        *,
        time_sampling: str = "auto",
        min_snr_gamma: float = 5.0,
        sigma_data: float = 0.5,
        time_scale: float = 1.0,
    ) -> None:
        if weighting not in WEIGHTINGS:
            raise UserError(f"weighting {weighting!r} is unknown; choose one of {', '.join(WEIGHTINGS)}.")
        if self.needs_signal and schedule.alpha(torch.tensor(schedule.t_max)) == 0:
            raise UserError(
                f"objective {self.name} is not defined where alpha = 0, as at the noisiest time of schedule "
                f"{schedule.name} here; choose objective x0, v, flow or edm, or a schedule that keeps some signal."
            )
        sample_t(schedule, 1, time_sampling, generator=torch.Generator())  # a bad choice is refused here
        self.schedule, self.time_sampling = schedule, time_sampling
        self.sigma_data, self.min_snr_gamma, self.time_scale = sigma_data, min_snr_gamma, time_scale
        self.log_weight = WEIGHTINGS[weighting]

    @property
    def name(self) -> str:
        """Its key in OBJECTIVES."""
        return next(name for name, kind in OBJECTIVES.items() if kind is type(self))

    def sample_t(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """n training times (n,) on `device`; see `times.sample_t`."""
        return sample_t(self.schedule, n, self.time_sampling, generator=generator, device=device)

    def advance(self, images: int) -> None:  # noqa: B027
        """Told on the host, before each step, how many images the run has seen."""

    def log_snr(self, t: Tensor) -> Tensor:
        """The log-SNR (N,) of training times t (N,); of pairs (N, 2) it takes the first time."""
        return self.schedule.log_snr(t if t.ndim == 1 else t[:, 0])

    def precondition(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is given: x_in (N, C, H, W) and c_noise (N,)."""
        return per_image(self.schedule.c_in(t), x_t) * x_t, self.c_noise(t)

    def c_noise(self, t: Tensor) -> Tensor:
        """The number that the network is given for t: the schedule's, scaled."""
        return self.time_scale * self.schedule.c_noise(t)

    @abstractmethod
    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should put out for x_t, (N, C, H, W)."""

    @abstractmethod
    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of x0 that a network output implies, (N, C, H, W)."""

    @abstractmethod
    def log_gain(self, log_snr: Tensor) -> Tensor:
        """log c^2 at a log-SNR: error of x0_hat over error of the prediction, both squared; shaped like log_snr."""

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps: (N, C, H, W) for t (N,) (Ho et al. 2020, eq. 4)."""
        alpha, sigma = self._alpha_sigma(t, x0)
        return alpha * x0 + sigma * eps

    def weight(self, t: Tensor) -> Tensor:
        """Weight (N,) of the prediction's squared error at times t: w(log-SNR) c^2; 1 for `uniform`."""
        if self.log_weight is None:
            return torch.ones_like(t, dtype=result_dtype(t))
        log_snr = self.schedule.log_snr(t).clamp(-LARGEST_LOG_SNR, LARGEST_LOG_SNR)
        log_w = self.log_weight(log_snr, gamma=self.min_snr_gamma, sigma_data=self.sigma_data)
        return (log_w + self.log_gain(log_snr)).exp()

    def loss(self, model: Model, x0: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        """Weighted squared error of each image, averaged over its elements.

        Args:
            model: `model(x_in, c_noise, **cond)`.
            x0: (N, C, H, W) in [-1, 1].
            t: (N,) times from `sample_t`.
            eps: (N, C, H, W) standard normal.

        Returns:
            (N,), in float32 also under autocast (float64 for float64 x0).
        """
        x_in, c_noise = self.precondition(self.add_noise(x0, t, eps), t)
        prediction = model(x_in, c_noise, **cond)
        error = (prediction.to(x0.dtype) - self.target(x0, t, eps)).square().flatten(1).mean(1)
        return self.weight(t).to(error.dtype) * error

    def denoise(self, model: Model, x_t: Tensor, t: Tensor, r: Tensor | None = None, **cond: Tensor) -> Tensor:
        """The model's estimate of x0, (N, C, H, W), in the dtype of x_t.

        Args:
            x_t: (N, C, H, W).
            t: one time for all images (0-dim) or one for each (N,); above 0.
            r: the time to which a sampler steps; of interest to flow maps alone.
        """
        t = t.expand(len(x_t))
        x_in, c_noise = self.precondition(x_t, t)
        return self.to_x0(model(x_in, c_noise, **cond).to(x_t.dtype), x_t, t)

    def _alpha_sigma(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t (N,), shaped to multiply x."""
        return per_image(self.schedule.alpha(t), x), per_image(self.schedule.sigma(t), x)


class EpsObjective(Objective):
    """The network predicts the noise: L_simple (Ho et al. 2020, eq. 14)."""

    needs_signal = True

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return eps

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0 = (x_t - sigma eps) / alpha (Ho et al. 2020, below eq. 11)."""
        alpha, sigma = self._alpha_sigma(t, x_t)
        return (x_t - sigma * prediction) / alpha

    def log_gain(self, log_snr: Tensor) -> Tensor:
        """c^2 = sigma^2 / alpha^2."""
        return -log_snr


class X0Objective(Objective):
    """The network predicts the clean image (Salimans & Ho 2022, section 4)."""

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return x0

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return prediction

    def log_gain(self, log_snr: Tensor) -> Tensor:
        """c = 1."""
        return torch.zeros_like(log_snr)


class VObjective(Objective):
    """The network predicts v, the velocity along the arc from x0 to eps (Salimans & Ho 2022, appendix D).

    Dividing x_t by s = sqrt(alpha^2 + sigma^2) gives every schedule the paper's alpha^2 + sigma^2 = 1.
    """

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """v = (alpha eps - sigma x0) / s."""
        alpha, sigma = self._alpha_sigma(t, x0)
        return (alpha * eps - sigma * x0) / (alpha**2 + sigma**2).sqrt()

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0 = (alpha x_t / s - sigma v) / s."""
        alpha, sigma = self._alpha_sigma(t, x_t)
        s = (alpha**2 + sigma**2).sqrt()
        return (alpha / s * x_t - sigma * prediction) / s

    def log_gain(self, log_snr: Tensor) -> Tensor:
        """c^2 = sigma^2 / s^2 = sigmoid(-log-SNR)."""
        return F.logsigmoid(-log_snr)


class ScoreObjective(EpsObjective):
    """The network predicts the score, grad log p_t(x_t), times sigma (Song et al. 2021, eq. 7).

    Its output is divided by sigma to give the score, which grows as 1 / sigma (Song & Ermon 2020, technique 3), so
    that the network's target has unit variance, -eps. `uniform` is then the paper's weight lambda(t) = sigma^2 of the
    score's own error.
    """

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """sigma times the score of N(x_t; alpha x0, sigma^2), which is -eps / sigma (Vincent 2011)."""
        return -eps

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0 = (x_t + sigma^2 score) / alpha: Tweedie's formula (Efron 2011, eq. 1.4)."""
        alpha, sigma = self._alpha_sigma(t, x_t)
        return (x_t + sigma * prediction) / alpha


class FlowObjective(Objective):
    """The network predicts the velocity of the straight path from data to noise, eps - x0 (Liu et al. 2023, eq. 1).

    On schedule `flow` it is dx_t / dt; on any other it is still the difference of the path's ends.
    """

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """u = eps - x0."""
        return eps - x0

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0 = (x_t - sigma u) / (alpha + sigma), from x_t = (alpha + sigma) x0 + sigma u."""
        alpha, sigma = self._alpha_sigma(t, x_t)
        return (x_t - sigma * prediction) / (alpha + sigma)

    def log_gain(self, log_snr: Tensor) -> Tensor:
        """c^2 = (sigma / (alpha + sigma))^2 = sigmoid(-log-SNR / 2)^2."""
        return 2.0 * F.logsigmoid(-0.5 * log_snr)


class EDMObjective(Objective):
    """The network is wrapped so that its input and target have unit variance (Karras et al. 2022, eq. 7, table 1).

    The paper's sigma and x are sigma / alpha and x_t / alpha here. Multiplied out by alpha, with
    d = sqrt(sigma^2 + alpha^2 sigma_data^2), nothing is divided by alpha:

        x0_hat = c_skip x_t + c_out F(c_in x_t, c_noise)
        c_skip = alpha sigma_data^2 / d^2,   c_out = sigma sigma_data / d,   c_in = 1 / d

    c_noise is as for every objective. `uniform` is the weighting of the paper, 1 / c_out^2 on the error of x0_hat.
    """

    def _d(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (sigma**2 + (alpha * self.sigma_data) ** 2).sqrt()

    def precondition(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_in x_t and c_noise."""
        return x_t / self._d(*self._alpha_sigma(t, x_t)), self.c_noise(t)

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """(x0 - c_skip x_t) / c_out (eq. 8), written out without the division by sigma."""
        alpha, sigma = self._alpha_sigma(t, x0)
        return (sigma / self.sigma_data * x0 - alpha * self.sigma_data * eps) / self._d(alpha, sigma)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """D = c_skip x_t + c_out F (Karras et al. 2022, eq. 7)."""
        alpha, sigma = self._alpha_sigma(t, x_t)
        d = self._d(alpha, sigma)
        return alpha * self.sigma_data**2 / d**2 * x_t + sigma * self.sigma_data / d * prediction

    def log_gain(self, log_snr: Tensor) -> Tensor:
        """c_out^2 = 1 / (SNR + 1 / sigma_data^2)."""
        log_variance = 2.0 * math.log(self.sigma_data)
        return F.logsigmoid(-log_snr - log_variance) + log_variance


OBJECTIVES: dict[str, type[Objective]] = {
    "eps": EpsObjective,
    "x0": X0Objective,
    "v": VObjective,
    "score": ScoreObjective,
    "flow": FlowObjective,
    "edm": EDMObjective,
}


def make_objective(
    kind: str, *, schedule: str, timesteps: int = 1000, zero_terminal_snr: bool = False, **options: Any
) -> Objective:
    """Build an objective from the names of its parts: see `make_schedule`, and `Objective` for the options.

    Raises:
        UserError: a name that is not in its table, or parts that do not fit together.
    """
    if kind not in OBJECTIVES:
        raise UserError(f"objective {kind!r} is unknown; choose one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[kind](
        make_schedule(schedule, timesteps=timesteps, zero_terminal_snr=zero_terminal_snr), **options
    )

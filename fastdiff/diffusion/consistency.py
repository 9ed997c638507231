"""Consistency models: from noise to data in one evaluation of the network.

Write f(x_t, t) for the end at t = 0 of the probability flow through x_t. It is the same for all points of one
trajectory, which is what a network of any objective learns here (Song et al. 2023): its estimate at t is compared with
its estimate at an earlier r of the same trajectory, where it is nearer to the data and knows better.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.diffusion.objectives import Model, Objective, X0Objective, per_image
from fastdiff.diffusion.schedule import FEW_STEP_TOP
from fastdiff.diffusion.times import TIME_SAMPLINGS

Teacher = Callable[..., Tensor]  # teacher(x_t, t, **cond) -> x0_hat, without gradients
K, B = 8.0, 1.0  # steps are up to 1 + K / 2 times larger at small noise; Geng et al. 2024, section 3


class Tuned(Objective):
    """An objective whose network is trained for few steps: what the network is given and puts out stay the same.

    Args:
        kind: the objective that the network was trained by before.
        at: a training run's stage as a number, by the images that it has seen.
        device: of the batches.
    """

    shares_dropout = True

    def __init__(self, kind: Objective, at: Callable[[int], float], *, device: torch.device | str = "cpu") -> None:
        self.kind, self.at = kind, at
        self.schedule, self.time_sampling, self.time_scale = kind.schedule, kind.time_sampling, kind.time_scale
        self.stage = torch.tensor(at(0), dtype=torch.float64, device=device)  # a captured step reads it
        self.schedule.training_t(self.stage)  # some schedules have tables, which no captured step could upload

    @property
    def name(self) -> str:
        return self.kind.name

    def advance(self, images: int) -> None:
        """To be called before each step, with the images seen: on the host, with no sync."""
        self.stage.fill_(self.at(images))

    def precondition(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.kind.precondition(x_t, t)

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self.kind.target(x0, t, eps)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.kind.to_x0(prediction, x_t, t)

    def log_gain(self, log_snr: Tensor) -> Tensor:
        return self.kind.log_gain(log_snr)


class Consistency(Tuned):
    """Consistency training in the form of ECT (Geng et al. 2024), and distillation where there is a teacher.

        loss = w d(f(x_t, t), stop-gradient f(x_r, r)),    f(x_0, 0) = x_0
        w = 1 / (rho_t - rho_r) in ECT, 1 in distillation by Song et al. (2023)
        d(a, b) = sqrt(mean((a - b)^2) + c^2) - c                          (pseudo-Huber, Song & Dhariwal 2024)
        rho_r = rho_t (1 - gap (1 + K sigmoid(-B rho_t))), at least 0      (ECT's mapping)

    In training x_r is x0 with the noise of x_t. In distillation the teacher's flow leads from x_t to x_r. Both
    evaluations share one dropout mask. At t = 0 the objectives `edm`, `v` and `flow` estimate x_t itself. The objective
    `x0` does so by b = `boundary`:

        f = (b^2 x_t / alpha + rho^2 x0_hat) / (b^2 + rho^2)

    All is written in rho = sigma / alpha, and so for every schedule; rho above 80, where hardly any signal is left,
    counts as 80.

    Args:
        kind: the objective that the network was trained by; its weighting is `uniform` for ECT's w, `image` for 1.
        at: the gap (rho_t - rho_r) / rho_t where noise is large, in (0, 1), by the images seen.
        huber_c: c; the closer to 0, the closer to the plain distance.
        teacher: gives the trajectories; None: the data do.
        heun: the teacher takes Heun's steps in place of Euler's.
        teacher_steps: how many steps the teacher takes from t to r, even in sqrt(rho); only the last ends below t_min.
        boundary: of the objective x0; smaller, it changes fewer estimates.
    """

    def __init__(
        self,
        kind: Objective,
        at: Callable[[int], float],
        *,
        huber_c: float = 0.00054,
        teacher: Teacher | None = None,
        heun: bool = False,
        teacher_steps: int = 1,
        boundary: float = 0.1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(kind, at, device=device)
        self.huber_c, self.teacher, self.heun, self.teacher_steps = huber_c, teacher, heun, teacher_steps
        self.boundary = boundary if isinstance(kind, X0Objective) else 0.0

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """f(x_t, t), (N, C, H, W)."""
        x0 = self.kind.to_x0(prediction, x_t, t)
        if self.boundary == 0:
            return x0
        alpha, sigma = self._alpha_sigma(t, x_t)
        near = self.boundary**2 * alpha
        return (near * x_t + sigma**2 * x0) / (near * alpha + sigma**2)

    def sample_t(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """n training times (n,) on `device`; between whole times too, as r lies there."""
        name = "wide-log-normal" if self.time_sampling == "auto" else self.time_sampling
        return TIME_SAMPLINGS[name](self.schedule, n, generator, device).double()

    def loss(self, model: Model, x0: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        """The weighted distance of the two estimates of each image, (N,); see `Objective.loss`."""
        rho = (-0.5 * self.schedule.log_snr(t.double())).exp().clamp(max=FEW_STEP_TOP)
        r, rho_r = self.earlier(rho)
        x_t = self.add_noise(x0, t, eps)
        estimate = self.denoise(model, x_t, t, **cond)
        with torch.no_grad():
            x_r = self.add_noise(x0, r, eps) if self.teacher is None else self._led(x_t, t, r, rho, rho_r, **cond)
            at_r = self.denoise(model, x_r, r.clamp(min=self.schedule.t_min), **cond)
            target = torch.where(per_image(r, x0) > 0, at_r, x_r)
        square = (estimate - target).square().flatten(1).mean(1)
        distance = (square + self.huber_c**2).sqrt() - self.huber_c
        if self.kind.log_weight is None:  # weighting uniform: ECT's, which counts small noise most
            return distance / (rho - rho_r).to(distance.dtype)
        return distance

    def earlier(self, rho: Tensor) -> tuple[Tensor, Tensor]:
        """r and rho_r, (N,) each, for rho_t (N,); both 0 where r would lie below t_min."""
        rho_r = rho * (1.0 - self.stage * (1.0 + K * torch.sigmoid(-B * rho))).clamp(min=0.0)
        r = self.schedule.t_of_log_snr(-2.0 * rho_r.log())
        inside = r >= self.schedule.t_min
        return torch.where(inside, r, 0.0), torch.where(inside, rho_r, 0.0)

    def _led(self, x_t: Tensor, t: Tensor, r: Tensor, rho: Tensor, rho_r: Tensor, **cond: Tensor) -> Tensor:
        """x_r (N, C, H, W): along the teacher's probability flow from t to r (N,)."""
        for i in range(1, self.teacher_steps):
            level = torch.lerp(rho.sqrt(), rho_r.sqrt(), i / self.teacher_steps).square()
            s = self.schedule.t_of_log_snr(-2.0 * level.log()).clamp(min=self.schedule.t_min)
            x_t, t = self._step(x_t, t, s, **cond), s
        return self._step(x_t, t, r, **cond)

    def _step(self, x_t: Tensor, t: Tensor, r: Tensor, **cond: Tensor) -> Tensor:
        """x_r (N, C, H, W): a step of the teacher's probability flow in rho, from t to r (N,)."""
        assert self.teacher is not None
        cond.pop("dropout_seed", None)
        (alpha, sigma), (alpha_r, sigma_r) = self._alpha_sigma(t, x_t), self._alpha_sigma(r, x_t)
        x0 = self.teacher(x_t, t, **cond)
        keep = sigma_r / sigma
        slope = alpha_r - alpha * keep
        x_r = keep * x_t + slope * x0  # Euler: DDIM's eq. 12
        if not self.heun:
            return x_r
        at_r = self.teacher(x_r, r.clamp(min=self.schedule.t_min), **cond)
        shrinks = sigma_r * alpha > 0.05 * sigma * alpha_r  # a longer step, as to 0 or from above 80, is Euler's
        mix = torch.where(shrinks, alpha_r / (2.0 * alpha * keep), 0.0)  # mix * slope = alpha_r (rho - rho_r) / 2 rho_r
        return x_r + torch.where(shrinks, mix * slope * (at_r - x0), 0.0)

"""Few-step objectives with the exact derivative of the network, by forward-mode differentiation.

`consistency` and `flow-map` compare two times a small step apart; these are their limits, the step 0. The network is
plain PyTorch: our kernels have no forward derivative, and torch.compile fails on one of the U-Net (PyTorch 2.15).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.diffusion.consistency import Teacher, Tuned
from fastdiff.diffusion.flow_map import FlowMap, adaptive
from fastdiff.diffusion.objectives import EDMObjective, Model, Objective, per_image
from fastdiff.diffusion.times import log_normal
from fastdiff.errors import UserError

STRAIGHT = 0.25  # of the pairs of times are one time twice; as t_normal below, of the authors' CIFAR-10 code
P_MEAN, P_STD, P_STD_TAUGHT = -1.0, 1.8, 1.4  # of log sigma; Lu & Song 2025, table 5
NORM = 0.1  # added to the tangent's norm; Lu & Song 2025, section 4


def along(f: Callable[..., Tensor], point: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """f at the point, which passes gradients, and its derivative in the direction, which passes none."""
    with sdpa_kernel(SDPBackend.MATH):  # the only attention with a forward derivative
        value, derivative = jvp(f, point, direction)[:2]
    return value, derivative.detach()


class MeanFlow(FlowMap):
    """The flow map at a = 0, exactly (Geng et al. 2025, MeanFlow, eq. 10):

        u* = v - (t - r) d/dt u(x_t, t, t - r) along v,    v = eps - x0

    The loss is `adaptive` of u - u*. Arguments and errors as of `FlowMap`; `at` is not used.
    """

    t_normal = (-0.6, 1.6)

    def sample_t(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """n pairs (t, r), r <= t, (n, 2) float64 on `device`; a quarter with r = t, which is flow matching."""
        pairs = super().sample_t(n, generator=generator, device=device)
        straight = torch.rand(n, 1, generator=generator, device=device) < STRAIGHT
        return torch.where(straight, pairs[:, :1], pairs)

    def loss(self, model: Model, x0: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        """The weighted loss of each image (N,); t (N, 2) from `sample_t`, else as `Objective.loss`."""
        t, r = t.unbind(1)
        v = eps - x0

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self._velocity(model, x, t, r, **cond)

        u, slope = along(velocity, (self.add_noise(x0, t, eps), t), (v, torch.ones_like(t)))
        return adaptive(u - (v - per_image(t - r, x0) * slope))


class ContinuousConsistency(Tuned):
    """Consistency in continuous time: sCM (Lu & Song 2025), training, or distillation where there is a teacher.

    With y = c_in x_t and the angle a = atan(sigma / (alpha sigma_data)), the wrapped network F is on a circle:

        y = cos(a) x0 / sigma_data + sin(a) eps,    f / sigma_data = cos(a) y + sin(a) F(y, a)

    f is consistent where its derivative along the trajectory is 0. The loss is |F - stop-gradient(F - g)|^2. Its
    gradient is the limit of Consistency's gradient for a step of 0:

        g = sigma_data cos(a) d/da (f / sigma_data)
          = sigma_data (cos^2 (y' + F) + ramp cos sin (dF/da - y)),   divided by its norm + 0.1

    y' is cos eps - sin x0 / sigma_data, or the teacher's. The paper's learnt weight of noise levels is left out.

    Args:
        kind: of class EDMObjective.
        at: the ramp, in [0, 1], by the images seen.
        teacher: gives the trajectories; None: the data do.

    Raises:
        UserError: another objective.
    """

    def __init__(
        self, kind: Objective, at: Callable[[int], float], *, teacher: Teacher | None = None,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if not isinstance(kind, EDMObjective):
            raise UserError(f"--few-step scm needs --objective edm, but this is {kind.name}.")
        super().__init__(kind, at, device=device)
        self.teacher, self.sigma_data = teacher, kind.sigma_data

    def sample_t(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """n training times (n,) float64 on `device`."""
        std = P_STD if self.teacher is None else P_STD_TAUGHT
        return log_normal(self.schedule, n, generator, device, mean=P_MEAN, std=std).double()

    def loss(self, model: Model, x0: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        """The loss of each image (N,); see `Objective.loss`."""
        x_t = self.add_noise(x0, t, eps)
        y, _ = self.precondition(x_t, t)
        angle = torch.atan2(self.schedule.sigma(t.double()), self.schedule.alpha(t.double()) * self.sigma_data)
        cos, sin = per_image(angle.cos(), x0), per_image(angle.sin(), x0)
        turn = cos * eps - sin * x0 / self.sigma_data
        if self.teacher is not None:
            led = {name: value for name, value in cond.items() if name != "dropout_seed"}
            turn = (cos * y - self.teacher(x_t, t, **led) / self.sigma_data) / sin

        def network(y: Tensor, angle: Tensor) -> Tensor:
            time = self.schedule.t_of_log_snr(-2.0 * (self.sigma_data * angle.tan()).log(), clamp=False)
            return model(y, self.kind.c_noise(time), **cond).to(y.dtype)

        speed = angle.cos() * angle.sin()  # times the derivative, which alone is unbounded at both ends
        F, slope = along(network, (y, angle), (cos * sin * turn, speed))
        with torch.no_grad():
            ramp = self.stage.to(x0.dtype)
            g = self.sigma_data * (cos**2 * (turn + F) + ramp * (slope - cos * sin * y))
            g = g / (g.square().flatten(1).mean(1).sqrt() + NORM)[:, None, None, None]
            target = F - g
        return (F - target).square().flatten(1).mean(1)

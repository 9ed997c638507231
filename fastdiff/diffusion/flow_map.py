"""Flow maps: one evaluation of the network from any time t to any earlier r.

On schedule `flow` the network is given the span t - r besides t, and puts out the average velocity u of the way:

    x_r = x_t - (t - r) u(x_t, t, t - r)        (Geng et al. 2025, MeanFlow, eq. 3)

At span 0 it is the velocity of flow matching. With no derivative of the network, u over a long span is learned from the
velocity of its first part and from u over the rest (SoFlow; Boffi et al. 2025).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.diffusion.consistency import Tuned
from fastdiff.diffusion.objectives import FlowObjective, Model, Objective, per_image
from fastdiff.errors import UserError

T_NORMAL, R_NORMAL = (-0.9, 1.6), (-4.0, 1.6)  # mean and std of the logits of t and r; SoFlow, for CIFAR-10
P, C = 0.75, 1e-3  # of the adaptive weight; Geng et al. 2025, section 4.3


def adaptive(error: Tensor) -> Tensor:
    """|error|^2 / stop-gradient(|error|^2 + C)^P of each image, (N,)."""
    square = error.square().flatten(1).mean(1)
    return square / (square.detach() + C) ** P


class FlowMap(Tuned):
    """The average velocity, from the ratio a = (t - s) / (t - r) of two parts of the way:

        u* = a v + (1 - a) stop-gradient u(x_s, s, s - r),    x_s = x_t - (t - s) v,    v = eps - x0

    a = 1 is flow matching, 1/2 the identity of shortcut models, and a towards 0 MeanFlow. The loss is `adaptive` of
    (u - u*) / a.

    Args:
        kind: `flow` on schedule `flow`.
        at: a, in (0, 1], by the images seen.

    Raises:
        UserError: another objective or schedule.
    """

    t_normal, r_normal = T_NORMAL, R_NORMAL

    def __init__(self, kind: Objective, at: Callable[[int], float], *, device: torch.device | str = "cpu") -> None:
        if not isinstance(kind, FlowObjective) or kind.schedule.name != "flow":
            raise UserError(
                "--few-step flow-map averages the velocity of --objective flow on --schedule flow; choose these."
            )
        super().__init__(kind, at, device=device)

    def sample_t(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """n pairs (t, r), r <= t, (n, 2) float64 on `device`."""
        z = torch.randn(2, n, generator=generator, device=device, dtype=torch.float64)
        t, r = (
            (mean + std * each).sigmoid() for each, (mean, std) in zip(z, (self.t_normal, self.r_normal), strict=True)
        )
        t = t.clamp(min=self.schedule.t_min)
        return torch.stack([t, r.minimum(t)], 1)

    def loss(self, model: Model, x0: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        """The weighted loss of each image (N,); t (N, 2) from `sample_t`, else as `Objective.loss`."""
        t, r = t.unbind(1)
        s = t - self.stage * (t - r)
        x_t, v, a = self.add_noise(x0, t, eps), eps - x0, self.stage.to(x0.dtype)
        u = self._velocity(model, x_t, t, r, **cond)
        with torch.no_grad():
            rest = self._velocity(model, x_t - per_image(t - s, x0) * v, s, r, **cond)
            target = a * v + (1 - a) * rest
        return adaptive((u - target) / a)

    def denoise(self, model: Model, x_t: Tensor, t: Tensor, r: Tensor | None = None, **cond: Tensor) -> Tensor:
        """The x0_hat (N, C, H, W) on the straight line from x_t through its x_r; see `Objective.denoise`.

        Args:
            r: where the step ends, 0-dim; by default it is the tangent at t, so that other samplers follow the flow.
        """
        t = t.expand(len(x_t))
        return self.to_x0(self._velocity(model, x_t, t, t if r is None else r.expand(len(x_t)), **cond), x_t, t)

    def _velocity(self, model: Model, x_t: Tensor, t: Tensor, r: Tensor, **cond: Tensor) -> Tensor:
        """u(x_t, t, t - r)."""
        x_in, c_noise = self.precondition(x_t, t)
        return model(x_in, c_noise, span=c_noise - self.kind.c_noise(r), **cond).to(x_t.dtype)

"""What a run's network learns: its objective as it is, or tuned for few steps, perhaps by a frozen teacher."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.config import Config
from fastdiff.diffusion.consistency import Consistency
from fastdiff.diffusion.flow_map import FlowMap
from fastdiff.diffusion.guidance import guidance_weight, guide
from fastdiff.diffusion.objectives import Objective, make_objective
from fastdiff.diffusion.tangents import ContinuousConsistency, MeanFlow
from fastdiff.evaluation.generate import half_weights, on_device, padded
from fastdiff.evaluation.graph_loop import Conditions
from fastdiff.model_sections import Guidance
from fastdiff.nets.fuse import fuse
from fastdiff.nets.unet import UNet
from fastdiff.runs.weights import TeacherWeights


def objective_of(
    config: Config, device: torch.device, *, teacher: TeacherWeights | None = None, nothing: Conditions | None = None
) -> Objective:
    """The objective that the resolved config asks for, with its tensors on the device.

    Args:
        teacher: the weights that --teacher names.
        nothing: what each condition is where nothing is asked for, one row each; a guided teacher leads away from it.
    """
    objective, tuning = make_objective(**config.diffusion.arguments), config.tuning
    if tuning.few_step == "none":
        return objective
    if tuning.two_times:
        return (MeanFlow if tuning.exact else FlowMap)(objective, tuning.at, device=device)
    led = None if teacher is None else _frozen(config, objective, teacher, device, nothing or {})
    if tuning.exact:
        return ContinuousConsistency(objective, tuning.at, teacher=led, device=device)
    return Consistency(
        objective, tuning.at, huber_c=tuning.huber_c, teacher=led, heun=tuning.teacher_solver == "heun",
        teacher_steps=tuning.teacher_steps, boundary=tuning.boundary, device=device,
    )  # fmt: skip


def _frozen(
    config: Config, objective: Objective, weights: TeacherWeights, device: torch.device, nothing: Conditions
) -> Callable[..., Tensor]:
    """The teacher as `teacher(x_t, t, **cond) -> x0_hat`."""
    model = UNet(config.net)
    model.load_state_dict(weights.state)
    model = model.to(device).eval().requires_grad_(False)
    network = fuse(model) if config.machine.kernels == "triton" else model
    if config.machine.precision == "bf16":
        network = half_weights(network)
    scale = config.tuning.teacher_guidance
    numbers = torch.tensor([Guidance(scale).numbers], dtype=torch.float64, device=device)
    rows = on_device(nothing, device)

    def denoise(x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        asked = objective.denoise(network, x_t, t, **cond)
        if scale == 1:
            return asked
        unasked = {name: padded(v, cond[name]).expand_as(cond[name]) for name, v in rows.items()}
        other = objective.denoise(network, x_t, t, **unasked)
        return guide(asked, other, guidance_weight(objective.schedule, t, numbers))

    return denoise

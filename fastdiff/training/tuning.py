"""What a run's network learns: its objective as it is, or tuned for few steps."""

import torch

from fastdiff.config import Config
from fastdiff.diffusion.consistency import Consistency
from fastdiff.diffusion.objectives import Objective, make_objective


def objective_of(config: Config, device: torch.device) -> Objective:
    """The objective that the config asks for, with its tensors on the device."""
    objective, tuning = make_objective(**config.diffusion.arguments), config.tuning
    if tuning.few_step == "none":
        return objective
    return Consistency(objective, tuning.at, huber_c=tuning.huber_c, device=device)

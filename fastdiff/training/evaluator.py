"""What a training run samples: the distance of its averaged weights, and pictures of the two processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.config import Config
from fastdiff.data.datasets import ImageSet
from fastdiff.diffusion.objectives import Model, Objective
from fastdiff.evaluation.evaluate import evaluate
from fastdiff.evaluation.frechet import FrechetDistance, to_uint8
from fastdiff.evaluation.graph_loop import GraphLoop
from fastdiff.evaluation.sampling import SamplerSettings, half_weights, trajectory
from fastdiff.reporting import pictures
from fastdiff.training.distributed import Ranks
from fastdiff.training.ema import EMA
from fastdiff.training.step import step_seed

# Evaluations draw the same noise every time, so that grids of one run can be compared; apart from the steps' streams.
EVALUATION_STREAM = 2**32 - 1


class Evaluator:
    """Samples from the averaged weights, as they are at each call.

    Args:
        config: the run; its `eval_*` fields count.
        ema: the average; with bf16 a copy in bfloat16 samples.
        distance: what is measured; None to draw pictures only.
        ranks: the processes that share the samples out.
        compile: whether the network that is measured is compiled.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        ema: EMA,
        distance: FrechetDistance | None,
        *,
        ranks: Ranks,
        bf16: bool,
        compile: bool,
    ) -> None:
        self.config, self.objective, self.ema, self.distance, self.ranks = config, objective, ema, distance, ranks
        self.net = half_weights(ema.model) if bf16 else ema.model
        self.model: Model = torch.compile(self.net, fullgraph=True) if compile else self.net
        # Kept, so that each sampling step is captured once in a run; one for each of the two networks.
        self.loop, self.trajectory_loop = GraphLoop(), GraphLoop()
        size = config.net.image_size
        self.common: dict[str, Any] = {
            "settings": SamplerSettings(config.eval_sampler, config.eval_steps),
            "image_shape": (config.net.image_channels, size, size),
            "seed": step_seed(config.seed, EVALUATION_STREAM),
            "device": ranks.device,
            "bf16": bf16,
            "graphs": config.graphs,
        }

    def measure(self, check: Callable[[], object]) -> tuple[dict[str, Any], np.ndarray]:
        """The row and the first samples of `evaluate`, of the weights as they are now; all ranks call it."""
        if self.net is not self.ema.model:
            self.ema.copy_to(self.net)
        config = self.config
        return evaluate(
            self.model, self.objective, self.distance, n=config.eval_samples, batch_size=config.eval_batch_size,
            keep=config.grid_samples, check=check, ranks=self.ranks, loop=self.loop, **self.common,
        )  # fmt: skip

    def draw_trajectory(self, path: Path) -> None:
        """One sampling on its way, of the weights that were measured last."""
        x_t, x0_hat, times = trajectory(self.net, self.objective, loop=self.trajectory_loop, **self.common)
        pictures.plot_trajectory(_nhwc(x_t), _nhwc(x0_hat), times, path)


def draw_forward_noising(objective: Objective, image_set: ImageSet, path: Path, *, seed: int) -> None:
    """How up to four random images dissolve: x_t, scaled as for the network, at eight times up to the noisiest."""
    images = image_set.images[image_set.draw(min(4, len(image_set.images)), seed=seed)]
    schedule = objective.schedule
    later = schedule.time_at(torch.linspace(0, 1, 8, dtype=torch.float64)[1:])
    times = torch.cat([later.new_zeros(1), later])
    x0 = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed), dtype=x0.dtype)
    columns = [to_uint8(schedule.c_in(t) * objective.add_noise(x0, t.expand(len(x0)), eps)) for t in times]
    labels = [f"t = {t:.3g}\nlog-SNR {schedule.log_snr(t):.1f}" for t in times]
    pictures.plot_forward_noising(_nhwc(torch.stack(columns, 1)), labels, path)


def _nhwc(images: torch.Tensor) -> np.ndarray:
    return images.movedim(-3, -1).numpy()

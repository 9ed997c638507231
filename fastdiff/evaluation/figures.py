"""Pictures of the two processes: how images dissolve into noise, and how a sampler finds its way back."""

from pathlib import Path

import numpy as np
import torch

from fastdiff.data.datasets import ImageSet
from fastdiff.diffusion.objectives import Objective
from fastdiff.evaluation.generate import NONE, Generator
from fastdiff.evaluation.space import PIXELS, Space
from fastdiff.evaluation.wishes import Wishes
from fastdiff.model_sections import Guidance
from fastdiff.reporting import pictures


def draw_forward_noising(
    objective: Objective, image_set: ImageSet, path: Path, *, seed: int, space: Space = PIXELS
) -> None:
    """How up to four random images dissolve: x_t, scaled as for the network, at eight times up to the noisiest."""
    images = image_set.images[image_set.draw(min(4, len(image_set.images)), seed=seed)]
    schedule = objective.schedule
    later = schedule.time_at(torch.linspace(0, 1, 8, dtype=torch.float64)[1:])
    times = torch.cat([later.new_zeros(1), later])
    x0 = space.encode(torch.from_numpy(images)).double()
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed), dtype=x0.dtype).to(x0.device)
    times = times.to(x0.device)
    noised = (schedule.c_in(t) * objective.add_noise(x0, t.expand(len(x0)), eps) for t in times)
    columns = [space.decode(x_t).cpu() for x_t in noised]
    labels = [f"t = {t:.3g}\nlog-SNR {schedule.log_snr(t):.1f}" for t in times]
    rows = _nhwc(torch.stack(columns, 1))
    pictures.save_labelled(rows[:, None], "Forward process: data to noise", labels, [""], path)


def draw_trajectory(
    generator: Generator, path: Path, *, seed: int, wishes: Wishes | None = None, guidance: Guidance = NONE
) -> None:
    """One sampling on its way: x_t and the estimate of x0 at each stage, of up to four wishes."""
    asked = {name: v[:4] for name, v in wishes.rows.items()} if wishes is not None else {}
    samples = min(4, len(wishes.names)) if wishes is not None else 4
    x_t, x0_hat, times = generator.trajectory(seed=seed, samples=samples, conditions=asked, guidance=guidance)
    pairs = _nhwc(torch.stack([x_t, x0_hat], 1))
    title = r"Sampling: $x_t$ above, the network's $\hat{x}_0$ below"
    pictures.save_labelled(pairs, title, [f"t = {t:.4g}" for t in times], ["$x_t$", r"$\hat{x}_0$"], path)


def _nhwc(images: torch.Tensor) -> np.ndarray:
    return images.movedim(-3, -1).numpy()

"""Evaluation of a network: samples, and their Frechet distance to a reference set."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.config import Config
from fastdiff.diffusion.objectives import Model, Objective, make_objective
from fastdiff.errors import UserError
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.evaluation.sampling import SamplerSettings, batch_count, sample_batches
from fastdiff.nets.unet import UNet
from fastdiff.reporting.progress import track
from fastdiff.training import checkpoint


@dataclass(frozen=True)
class Trained:
    """A network as it was saved: averaged weights in eval mode, its objective, and the run's config."""

    config: Config
    model: UNet
    objective: Objective
    step: int
    path: Path


def load_trained(path: Path | str, *, device: torch.device) -> Trained:
    """Load the averaged weights of a run's newest checkpoint, or of one `step-N` folder.

    Raises:
        UserError: nothing there, or nothing that verifies.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        found = checkpoint.load_latest(path / "checkpoints")
    elif (path / "manifest.json").is_file():
        found = checkpoint.load(path)
    else:
        raise UserError(
            f"{path} is neither a run directory nor a checkpoint; name one such as working/1 or "
            "working/1/checkpoints/step-10000."
        )
    if found is None:
        raise UserError(f"{path} has no checkpoint yet.")
    for skipped, reason in found.skipped:
        print(f"skipped {skipped}: {reason}", file=sys.stderr)
    config = Config.from_dict(found.state["config"])
    model = UNet(config.net)
    model.load_state_dict(found.state["ema"])
    objective = make_objective(
        config.objective, schedule=config.schedule, timesteps=config.timesteps, weighting=config.weighting
    )
    return Trained(config, model.to(device).eval(), objective, found.step, found.path)


def evaluate(
    model: Model,
    objective: Objective,
    distance: FrechetDistance | None,
    *,
    n: int,
    settings: SamplerSettings,
    image_shape: tuple[int, int, int],
    batch_size: int,
    seed: int,
    device: torch.device,
    bf16: bool,
    keep: int,
    check: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Any], np.ndarray]:
    """Draw samples and measure their distance to the reference set.

    Args:
        distance: holds the reference; None to draw samples only.
        n: samples for the distance.
        keep: the first samples, to be looked at; all that is drawn without a distance.
        check: called at every sampling step; may raise to break off.

    Returns:
        A row that names the metric, its value, the number of samples, the sampler, its steps, the extractor, the
        reference set and the seconds it took; and the kept samples, uint8 (keep, H, W, C).
    """
    started = time.perf_counter()
    total = max(n, keep) if distance is not None else keep
    if distance is not None:
        distance.reset()
    kept: list[Tensor] = []
    drawn = 0
    batches = sample_batches(
        model, objective, total, settings=settings, image_shape=image_shape, batch_size=batch_size, seed=seed,
        device=device, bf16=bf16, on_step=lambda *_: check(),
    )  # fmt: skip
    for images in track(batches, "sampling", total=batch_count(total, batch_size)):
        if drawn < keep:
            kept.append(images[: keep - drawn].cpu())
        if distance is not None and drawn < n:
            distance.update(images[: n - drawn])
        drawn += len(images)
    row: dict[str, Any] = {"sampler": settings.name, "sampler_steps": settings.steps, "eta": settings.eta}
    if distance is not None:
        row |= {
            "metric": distance.metric,
            "value": distance.compute(),
            "samples": n,
            "features": distance.extractor.name,
            "feature_size": distance.extractor.size,
            "reference": distance.reference,
        }
    row["seconds"] = time.perf_counter() - started
    return row, torch.cat(kept).permute(0, 2, 3, 1).numpy()

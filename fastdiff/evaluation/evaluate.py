"""Evaluation of a network: samples, and their Frechet distance to a reference set."""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff._kernels import TRITON_INSTALLED
from fastdiff.config import Config
from fastdiff.data.cache import cache_folder
from fastdiff.diffusion.consistency import Consistency
from fastdiff.diffusion.flow_map import FlowMap
from fastdiff.diffusion.objectives import Objective, make_objective
from fastdiff.diffusion.schedules import unnoised_end
from fastdiff.errors import UserError
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.evaluation.generate import NONE, Generator, SamplerSettings
from fastdiff.evaluation.graph_loop import Conditions
from fastdiff.evaluation.space import PIXELS, Latents, Space
from fastdiff.evaluation.wishes import nothing
from fastdiff.model_sections import Guidance
from fastdiff.nets.fuse import fuse
from fastdiff.nets.unet import UNet
from fastdiff.reporting.progress import bar
from fastdiff.runs.latents import AutoencoderWeights, autoencoder_weights
from fastdiff.runs.texts import Texts, text_reader
from fastdiff.runs.weights import read_trained
from fastdiff.runtime.signals import Stopped
from fastdiff.runtime.world import Ranks


@dataclass(frozen=True)
class Trained:
    """A network as it was saved: averaged weights in eval mode, its objective, and the run's config.

    model     the network
    network   what runs, by the run's --kernels: the model itself, or fused over the same weights
    run       the run directory of a checkpoint that lies in one
    saved     the rest of the checkpoint's state, without tensors
    moved     where the run's autoencoder lies now
    graphs    capture its decoder in CUDA graphs
    """

    config: Config
    model: UNet
    network: nn.Module
    objective: Objective
    step: int
    path: Path
    run: Path | None
    saved: dict[str, Any]
    moved: Path | None = None
    graphs: bool = True

    def generator(self, settings: SamplerSettings, **options: Any) -> Generator:
        """Draws from it; see `Generator` for the options."""
        net = self.config.net
        shape = net.image_channels, net.image_size, net.image_size
        return Generator(
            self.network, self.objective, settings, shape=shape, space=self.space,
            nothing=nothing(self.config, self.read), **options,
        )  # fmt: skip

    @cached_property
    def autoencoder(self) -> AutoencoderWeights | None:
        """Of a network that works in latents. Raises UserError if it is missing, or another one than the run's."""
        home = self.run or self.path
        return autoencoder_weights(self.config, self.saved, home=home, moved=self.moved, flag="--autoencoder")

    @cached_property
    def space(self) -> Space:
        """What the network works in. Raises UserError as `autoencoder`."""
        device = next(self.model.parameters()).device
        return space_of(self.config, self.autoencoder, device, graphs=self.graphs)

    @cached_property
    def read(self) -> Texts | None:
        """What turns texts into the network's arguments."""
        return text_reader(self.config, cache_folder(self.config.images.data_root))


def load_trained(path: Path | str, *, device: torch.device, moved: Path | None = None, graphs: bool = True) -> Trained:
    """Load averaged weights (see `read_trained`), to run with the run's --kernels.

    Args:
        moved, graphs: see `Trained`.

    Raises:
        UserError: nothing there, or nothing that verifies.
    """
    saved = read_trained(path)
    config = saved.config
    if config.autoencoder.factor:
        raise UserError(
            f"{path} holds an autoencoder; a network in its latents is trained by `train_cifar.py --latents {path}`."
        )
    model = UNet(config.net)
    model.load_state_dict(saved.state)
    model = model.to(device).eval()
    network = fuse(model) if _fused(config, device) else model
    objective = make_objective(**config.diffusion.arguments)
    if config.net.two_times:
        objective = FlowMap(objective, config.tuning.at, device=device)
    if config.tuning.few_step == "consistency":
        objective = Consistency(objective, config.tuning.at, boundary=config.tuning.boundary, device=device)
    if warning := unnoised_end(objective.schedule):
        print(f"warning: {warning}", file=sys.stderr)
    return Trained(
        config, model, network, objective, saved.step, saved.path, saved.run, saved.rest, moved=moved, graphs=graphs
    )


def space_of(config: Config, autoencoder: AutoencoderWeights | None, device: torch.device, *, graphs: bool) -> Space:
    """What the config's network works in."""
    if autoencoder is None:
        return PIXELS
    return Latents(autoencoder.make(device), fused=_fused(config, device), graphs=graphs)


def _fused(config: Config, device: torch.device) -> bool:
    """Whether our kernels run, by the run's --kernels, where they can."""
    ours = config.resolved(device.type).machine.kernels == "triton"
    return ours and (TRITON_INSTALLED or device.type == "cpu")


def evaluate(
    generator: Generator,
    distance: FrechetDistance | None,
    *,
    n: int,
    seed: int,
    keep: int,
    check: Callable[[], object] = lambda: None,
    ranks: Ranks | None = None,
    conditions: Conditions | None = None,
    guidance: Guidance = NONE,
    columns: int | None = None,
) -> tuple[dict[str, Any], np.ndarray]:
    """Draw samples and measure their distance to the reference set.

    Args:
        distance: holds the reference; None to draw samples only.
        n: samples for the distance.
        keep: how many of the first samples to return; without a distance only these are drawn.
        check: called at every sampling step; may raise Stopped, and then all ranks stop.
        ranks: the processes that share the samples, by whole batches; all call with the same arguments. The features'
            sums are added up over them, in float64. None for a single process.
        conditions, guidance, columns: see `Generator.batches`.

    Returns:
        A row that names the metric, its value, the number of samples, the sampler, its steps, the extractor, the
        reference set and the seconds it took; and the kept samples, uint8 (keep, H, W, C), which only rank 0 has.
    """
    ranks = ranks or Ranks(generator.device)
    started = time.perf_counter()
    total = max(n, keep) if distance is not None else keep
    if distance is not None:
        distance.reset()
    kept: list[tuple[int, Tensor]] = []
    size = min(generator.batch_size, total)
    with bar("sampling", total) if ranks.is_main else nullcontext() as show:
        batches = generator.batches(
            total, seed=seed, conditions=conditions, guidance=guidance, columns=columns, on_step=lambda *_: check(),
            progress=show, rank=ranks.rank, ranks=ranks.size,
        )  # fmt: skip
        for first in range(size * ranks.rank, total + size * ranks.rank, size * ranks.size):  # as often on every rank
            try:
                images, stopped = next(batches, None), False
            except Stopped:
                images, stopped = None, True
            if images is not None and first < keep:
                kept.append((first, images[: keep - first].cpu()))
            if images is not None and distance is not None and first < n:
                distance.update(images[: n - first])
            if ranks.any(stopped, "sampling"):  # also if a signal reached only some of the ranks in time
                raise Stopped
    grid = sorted((each for part in ranks.gather(kept, "the samples") for each in part), key=lambda each: each[0])
    settings = generator.settings
    row: dict[str, Any] = {"sampler": settings.label, "sampler_steps": settings.steps, "eta": settings.eta}
    if conditions:
        row["labels"] = "captions" if "text" in conditions else "balanced"
    if conditions or guidance.scale != 1:
        levels = "off" if guidance.interval is None else "{:g},{:g}".format(*guidance.interval)
        row |= {"guidance": guidance.scale, "guidance_interval": levels}
    if distance is not None:
        ranks.sum_(list(distance.sums), "the features' sums")
        row |= {
            "metric": distance.metric,
            "value": ranks.share(distance.compute() if ranks.is_main else None, "the distance"),
            "samples": n,
            "features": distance.extractor.name,
            "feature_size": distance.extractor.size,
            "reference": distance.reference,
        }
    row["seconds"] = time.perf_counter() - started
    empty = torch.empty(0, *generator.image_shape, dtype=torch.uint8)
    return row, torch.cat([empty, *(images for _, images in grid)]).permute(0, 2, 3, 1).numpy()

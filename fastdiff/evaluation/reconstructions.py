"""Evaluations of an autoencoder while it trains: how well it gives images back, and what its latents are like."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.datasets import ImageSet
from fastdiff.data.pixels import normalize, to_uint8
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.nets.autoencoder import Autoencoder
from fastdiff.reporting import pictures
from fastdiff.reporting.progress import bar
from fastdiff.runs.run import Run
from fastdiff.runtime.signals import Stopped
from fastdiff.runtime.world import Ranks
from fastdiff.words import counted

COLUMNS = 10  # of the picture
SSIM_SIDE = 11  # pixels of its window


@dataclass(frozen=True)
class ReconstructionEvaluator:
    """Encodes training images, decodes the means of their latents, and compares, as `Evaluator` does for samples.

    The rows have `psnr` (dB) and `ssim`, means over the images; `latent_mean` and `latent_std`, over the channels; and
    as metric the Frechet distance of reconstructions to all training images (`rfd_...`, `rfid`), or without an
    extractor `rmse` in grey levels. All in float32.

    Args:
        autoencoder: the average.
        shown: images in the picture.
        seed: which images; the same at every evaluation.
        measured: is given the latents' mean and standard deviation, (latent_channels,) each.
    """

    autoencoder: Autoencoder
    images: ImageSet
    distance: FrechetDistance | None
    ranks: Ranks
    run: Run | None
    batch_size: int
    shown: int
    seed: int
    say: Callable[[str], None]
    measured: Callable[[Tensor, Tensor], None]

    def __call__(self, step: int, images: int, check: Callable[[], object], *, samples: int) -> dict[str, Any] | None:
        """As `Evaluator`, with `check` called before each batch, on at most as many images as there are."""
        started, n = time.perf_counter(), min(samples, len(self.images.images))
        chosen = np.sort(self.images.draw(n, seed=self.seed))
        channels = self.autoencoder.config.latent_channels
        sums = torch.zeros(4 + 2 * channels, dtype=torch.float64, device=self.ranks.device)
        if self.distance is not None:
            self.distance.reset()
        first, each = self.ranks.rank * self.batch_size, self.ranks.size * self.batch_size
        with bar("reconstructing", n) if self.ranks.is_main else nullcontext(lambda done: None) as tell:
            for start in range(first, n + first, each):  # as often on every rank
                try:
                    check()
                    stopped = False
                except Stopped:
                    stopped = True
                if self.ranks.any(stopped, "reconstructing"):
                    raise Stopped
                if start < n:
                    part = self.images.images[chosen[start : start + self.batch_size]]
                    sums += self._measure(torch.from_numpy(part).to(self.ranks.device))
                    tell(min(n, start + len(part) * self.ranks.size))
        self.ranks.sum_([sums, *(self.distance.sums if self.distance is not None else ())], "the reconstructions' sums")
        squared, psnr, ssim, positions = sums[:4].tolist()
        mean, second = (sums[4:] / positions).split(channels)
        std = (second - mean.square()).sqrt()
        self.measured(mean, std)
        if self.run is None:
            return None
        row: dict[str, Any] = {"metric": "rmse", "value": (squared / n) ** 0.5}
        if self.distance is not None:
            extractor = self.distance.extractor
            row = {
                "metric": f"r{self.distance.metric}", "value": self.distance.compute(), "features": extractor.name,
                "feature_size": extractor.size,
            }  # fmt: skip
        row |= {
            "samples": n, "reference": self.images.name, "psnr": psnr / n,
            "ssim": ssim / n if self._has_ssim else None, "latent_mean": mean.mean().item(),
            "latent_std": std.mean().item(), "seconds": time.perf_counter() - started,
            "step": step, "images": images, "checkpoint": f"step-{step}" if step else None,
        }  # fmt: skip
        with self.run.spared(self.say):
            self._draw(step)
        self.run.log_eval(row)
        self.say(
            f"step {step:,}: {row['metric']} {row['value']:.3f}, PSNR {row['psnr']:.2f} dB "
            f"({counted(n, 'reconstruction')}, latents {row['latent_mean']:.2f} +- {row['latent_std']:.2f}, "
            f"{row['seconds']:.0f} s)"
        )
        return row

    @property
    def _has_ssim(self) -> bool:
        return min(self.images.images.shape[1:3]) >= SSIM_SIDE

    @torch.no_grad()
    def _reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images uint8 (N, H, W, 3) -> reconstructions uint8 (N, 3, H, W); mean and log variance of their latents."""
        mean, log_var = self.autoencoder.encode(normalize(images))
        return to_uint8(self.autoencoder.decode(mean)), mean, log_var

    def _measure(self, images: Tensor) -> Tensor:
        """Sums over images: squared error, PSNR, SSIM, positions; of each channel latents and their second moments."""
        y, mean, log_var = self._reconstruct(images)
        if self.distance is not None:
            self.distance.update(y)
        x, y = images.permute(0, 3, 1, 2).float(), y.float()
        squared = (x - y).square().flatten(1).mean(1).double()
        psnr = 10 * torch.log10(255.0**2 / squared.clamp(min=1e-3))  # a perfect image has 78 dB, not infinity
        ssim = torch.zeros((), device=x.device)
        if self._has_ssim:
            from torchmetrics.functional.image import structural_similarity_index_measure  # its import takes seconds

            each = structural_similarity_index_measure(x, y, data_range=255.0, reduction="none")
            assert isinstance(each, Tensor)
            ssim = each.double().sum()
        second = mean.double().square() + log_var.double().exp()
        positions = torch.tensor(float(mean[:, 0].numel()), device=x.device)
        of_images = torch.stack([squared.sum(), psnr.sum(), ssim, positions])
        return torch.cat([of_images, mean.double().sum((0, 2, 3)), second.sum((0, 2, 3))])

    def _draw(self, step: int) -> None:
        """Rows of images, each above their reconstructions."""
        assert self.run is not None
        chosen = self.images.images[self.images.draw(min(self.shown, len(self.images.images)), seed=self.seed)]
        rebuilt, _, _ = self._reconstruct(torch.from_numpy(chosen).to(self.ranks.device))
        both = chosen, rebuilt.permute(0, 2, 3, 1).cpu().numpy()
        rows = [each[start : start + COLUMNS] for start in range(0, len(chosen), COLUMNS) for each in both]
        pictures.save_rows(
            rows, ["images", "decoded"] * (len(rows) // 2), self.run.saves / f"reconstructions-{step:08d}.png"
        )
        self.run.log_image("reconstructions", pictures.image_grid(np.concatenate(rows), columns=COLUMNS), step)

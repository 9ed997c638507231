"""What ranks do in tests; each function is run by every rank, in a process of its own."""

import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fastdiff.cli import run_command
from fastdiff.config import Config
from fastdiff.data.datasets import load_dataset
from fastdiff.diffusion.objectives import make_objective
from fastdiff.evaluation.evaluate import evaluate
from fastdiff.evaluation.features import FeatureExtractor
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.evaluation.generate import Generator, SamplerSettings
from fastdiff.nets.unet import UNet
from fastdiff.reporting import pictures
from fastdiff.runtime.world import Ranks
from tests.distributed import faulty
from tests.reliability.jobs import before_step, train_run


def rank_main(rank: int, size: int, port: int, program: str, arguments: list) -> int:
    """Be one rank, as torchrun would start it, and run a function of this module."""
    if size > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    return run_command(lambda: globals()[program](*arguments) or 0)


def train(config: dict, resume: str | None = None, fault: dict | None = None) -> int:
    """Train, without pictures, with a fault in one rank."""
    pictures.save_grid = pictures.save_labelled = lambda *arguments, **options: None
    if fault:
        faulty.inject(fault)
    return train_run(Config.from_dict(config), Path(resume) if resume else None)


def other_flags(config: dict, **changes) -> int:
    """Train, but rank 1 was started with other flags."""
    return train(config | (changes if os.environ["RANK"] == "1" else {}))


def other_objective(config: dict) -> int:
    """Rank 1 learns to predict something else."""
    return other_flags(config, objective="v")


def other_intervals(config: dict) -> int:
    """Rank 1 saves at other steps."""
    return other_flags(config, save_every=7)


def other_weights(config: dict) -> int:
    """Train, but rank 1 changes a weight by itself."""
    if os.environ["RANK"] == "1":
        before_step(3, lambda step: step.parameters[0].data.mul_(1.0001))
    return train(config)


def shared_samples(config: dict) -> None:
    """Samples, grid and statistics of two ranks are those of one."""
    config = Config.from_dict(config)
    with Ranks.launched("cpu", timeout=60) as ranks:
        image_set = load_dataset(config.images.data, root=config.images.data_root, image_size=config.net.image_size)
        distances = [
            FrechetDistance(
                FakeFeatures(),
                image_set,
                cache_dir=Path(config.images.data_root),
                device="cpu",
                reference=ranks.is_main,
            )
            for _ in range(2)
        ]
        torch.manual_seed(0)
        model = UNet(config.net).eval()
        for p in model.parameters():
            p.data += 0.02 * torch.randn_like(p)  # no layer is zero
        objective = make_objective("eps", schedule="ddpm-linear", timesteps=100, weighting="uniform")
        generator = Generator(
            model, objective, SamplerSettings("ddpm", 3), shape=(3, 8, 8), batch_size=4, device=ranks.device
        )
        row, grid = evaluate(generator, distances[0], n=22, seed=3, keep=10, ranks=ranks)
        if ranks.is_main:
            alone, whole_grid = evaluate(generator, distances[1], n=22, seed=3, keep=10)
            assert whole_grid.shape == (10, 8, 8, 3)
            assert (grid == whole_grid).all()
            for mine, theirs in zip(distances[0].sums, distances[1].sums, strict=True):
                assert ((mine - theirs).abs() <= 1e-10 * theirs.abs().max()).all()
            assert distances[0].count == 22
            assert abs(row["value"] - alone["value"]) <= 1e-10 * alone["value"]
            assert row["value"] > 0
        assert ranks.share(row["value"]) == row["value"]


class FakeFeatures(FeatureExtractor):
    """Features that any pixel moves: products with a fixed matrix."""

    name, metric, size, num_features = "fake", "fd_fake", 8, 16

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(192, 16, generator=torch.Generator().manual_seed(5)))

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W) -> (N, 16)."""
        return F.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1) @ self.matrix


def collectives() -> None:
    """Each does what it says, and leaves every rank with the same bits; the start may take longer than the timeout."""
    with Ranks.launched("cpu", timeout=3) as ranks:
        rank = ranks.rank
        with ranks.first_on_host("data"):
            if rank == 0:
                time.sleep(3.5)
            first = time.monotonic()
        first, second = ranks.share(first), first
        assert rank == 0 or second > first
        ranks.limit_waits()
        x, n = torch.randn(1000, generator=torch.Generator().manual_seed(rank)), torch.tensor(rank + 1)
        parts = [torch.randn(1000, generator=torch.Generator().manual_seed(r)) for r in range(ranks.size)]
        ranks.sum_([x, n])
        assert torch.equal(x, parts[0] + parts[1])
        assert n == 3
        assert ranks.any(10 * rank) == 10
        assert ranks.share({"rank": rank}) == {"rank": 0}
        assert ranks.gather(str(rank)) == (["0", "1"] if rank == 0 else [])
        ranks.check_equal(data="same")


def other_data() -> None:
    """Ranks that were given different data."""
    with Ranks.launched("cpu", timeout=20) as ranks:
        ranks.check_equal(data=f"set {ranks.rank}")
        ranks.barrier()


def other_order() -> None:
    """All ranks wait for each other, in different collectives."""
    with Ranks.launched("cpu", timeout=1) as ranks:
        ranks.limit_waits()
        if ranks.rank == 0:
            ranks.sum_([torch.zeros(10)])
        else:
            time.sleep(0.5)  # so that rank 0's time is up first
            ranks.share(None)
            ranks.share(None)

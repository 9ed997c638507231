"""The plain baseline: DDPM training as a first tutorial writes it, in eager float32 with a DataLoader."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdiff.config import Config
from fastdiff.nets.unet import UNet


class Images(Dataset):
    """uint8 (N, H, W, C) -> float32 (C, H, W) in [-1, 1], mirrored at random."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        x = torch.from_numpy(self.images[index]).permute(2, 0, 1).float() / 127.5 - 1
        return x.flip(2) if torch.rand(()) < 0.5 else x


def endless(images: np.ndarray, batch_size: int, *, workers: int, pin_memory: bool) -> Iterator[Tensor]:
    """Batches of a shuffling DataLoader, epoch after epoch."""
    loader = DataLoader(
        Images(images), batch_size, shuffle=True, drop_last=True, num_workers=workers, pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        yield from loader


def plain_step(config: Config, batches: Iterator[Tensor], device: torch.device) -> Callable[[int], None]:
    """A step of Ho et al. 2020, algorithm 1, with Adam, clipping and the average; NCHW memory, PyTorch's defaults.

    Args:
        config: network, learning rate, clipping, decay.
        batches: float32 (B, C, H, W) on the host.
    """
    model = UNet(config.net).to(device).to(memory_format=torch.contiguous_format)
    adam = torch.optim.Adam(model.parameters(), lr=config.optim.lr)
    average = [p.detach().clone() for p in model.parameters()]
    betas = torch.linspace(1e-4, 0.02, config.diffusion.timesteps, dtype=torch.float64)
    abar = (1 - betas).cumprod(0).float().to(device)

    def step(i: int) -> None:
        x0 = next(batches).to(device, non_blocking=True)
        t = torch.randint(config.diffusion.timesteps, (len(x0),), device=device)
        eps = torch.randn_like(x0)
        a = abar[t][:, None, None, None]
        loss = F.mse_loss(model(a.sqrt() * x0 + (1 - a).sqrt() * eps, t), eps)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        adam.step()
        with torch.no_grad():
            for mean, p in zip(average, model.parameters(), strict=True):
                mean.mul_(config.optim.ema_decay).add_(p, alpha=1 - config.optim.ema_decay)

    def with_defaults(i: int) -> None:
        # TF32 convolutions are on by default; without them this baseline would be slower than it is for anybody.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True):
            step(i)

    return with_defaults

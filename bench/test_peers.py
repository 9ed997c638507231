"""The same network and batch trained by another library: diffusers, with all switches as its users find them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.parts import constant_batch, our_step, training_work
from bench.suite import Against, Comparison, Size
from bench.timing import Workload
from fastdiff.interop import unet_to_diffusers
from fastdiff.nets.unet import UNet

pytestmark = pytest.mark.timeout(900)

PEER = "diffusers"


def diffusers_step(size: Size, batch: Tensor) -> Callable[[int], None]:
    """A step as in diffusers' examples/unconditional_image_generation: UNet2DModel, AdamW, clipping and EMAModel.

    Args:
        batch: uint8 (N, H, W, C) on the device.
    """
    try:
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel
    except ImportError:
        pytest.skip("diffusers is not installed: pip install diffusers")
    config = size.config
    model = unet_to_diffusers(UNet(config.net)).to(size.device).train()
    scheduler: Any = DDPMScheduler(config.diffusion.timesteps)
    adam = torch.optim.AdamW(
        model.parameters(), lr=config.optim.lr, weight_decay=config.optim.weight_decay, betas=(0.9, config.optim.beta2)
    )
    average = EMAModel(model.parameters(), decay=config.optim.ema_decay)
    average.to(size.device)

    def step(i: int) -> None:
        x0 = batch.permute(0, 3, 1, 2).contiguous() / 127.5 - 1
        eps = torch.randn_like(x0)
        t = torch.randint(config.diffusion.timesteps, (len(x0),), device=size.device)
        with torch.autocast(size.device.type, torch.bfloat16, enabled=size.bf16):
            loss = F.mse_loss(model(scheduler.add_noise(x0, eps, t), t).sample.float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        adam.step()
        adam.zero_grad()
        average.step(model.parameters())

    return step


def comparisons(size: Size) -> list[Comparison]:
    def build() -> dict[str, Workload]:
        batch, step = constant_batch(size), our_step(size)
        return {
            PEER: training_work(size, diffusers_step(size, batch)),
            "fastdiff": training_work(size, lambda i: step(batch, i)),
        }

    ratios = {"fastdiff": (Against(PEER, "higher"),)}
    return [Comparison("peers", f"batch {size.config.optim.batch_size}", (PEER, "fastdiff"), build, ratios)]


def test_peers(record):
    record()

"""The same network and batch trained by another library: diffusers, as its users find it, and tuned by hand.

Both train without flips, in the same precision, with the same dropout, clipping and average, attention by PyTorch's
own operator. What differs is told in bench/README.md.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.parts import constant_batch, our_step, training_work
from bench.suite import DDPM, Against, Comparison, Size
from bench.timing import Workload
from fastdiff.interop import unet_to_diffusers
from fastdiff.nets.unet import UNet

pytestmark = pytest.mark.timeout(900)

PEER, TUNED = "diffusers", "diffusers, tuned"


def diffusers_step(size: Size, batch: Tensor, *, tuned: bool = False) -> Callable[[int], None]:
    """A step as in diffusers' examples/unconditional_image_generation: UNet2DModel, AdamW, clipping and EMAModel.

    Args:
        batch: uint8 (N, H, W, C) on the device.
        tuned: with channels_last memory, fused AdamW and foreach in EMAModel; compiled where our step is.
    """
    try:
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel
    except ImportError:
        pytest.skip("diffusers is not installed: pip install diffusers")
    config = size.config
    model = unet_to_diffusers(UNet(config.net)).to(size.device).train()
    memory = torch.channels_last if tuned else torch.contiguous_format
    model.to(memory_format=memory)
    network = torch.compile(model) if tuned and size.ours else model
    scheduler: Any = DDPMScheduler(config.diffusion.timesteps)
    adam = torch.optim.AdamW(
        model.parameters(), lr=config.optim.lr, weight_decay=config.optim.weight_decay, betas=(0.9, config.optim.beta2),
        fused=True if tuned else None,
    )  # fmt: skip
    average = EMAModel(model.parameters(), decay=config.optim.ema_decay, foreach=tuned)
    average.to(size.device)

    def step(i: int) -> None:
        x0 = batch.permute(0, 3, 1, 2).contiguous(memory_format=memory) / 127.5 - 1
        eps = torch.randn_like(x0)
        t = torch.randint(config.diffusion.timesteps, (len(x0),), device=size.device)
        with torch.autocast(size.device.type, torch.bfloat16, enabled=size.bf16):
            loss = F.mse_loss(network(scheduler.add_noise(x0, eps, t), t).sample.float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        adam.step()
        adam.zero_grad()
        average.step(model.parameters())

    return step


def _comparison(size: Size, network: str) -> Comparison:
    def build() -> dict[str, Workload]:
        batch, step = constant_batch(size), our_step(size)
        return {
            PEER: training_work(size, diffusers_step(size, batch)),
            TUNED: training_work(size, diffusers_step(size, batch, tuned=True)),
            "fastdiff": training_work(size, lambda i: step(batch, i)),
        }

    ratios = {TUNED: (Against(PEER, "higher"),), "fastdiff": (Against(PEER, "higher"), Against(TUNED, "higher"))}
    case = f"{network}batch {size.config.optim.batch_size}"
    return Comparison("peers", case, (PEER, TUNED, "fastdiff"), build, ratios)


def comparisons(size: Size) -> list[Comparison]:
    found = [_comparison(size, "")]
    if size.config.net != DDPM.net and not size.trial:  # a CPU takes a few seconds for a step of it
        found.append(_comparison(replace(size, config=DDPM.replace(batch_size=2)), "ddpm-cifar10, "))
    return found


def test_peers(record):
    record()

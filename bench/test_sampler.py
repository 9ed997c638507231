"""Sampling, captured and not; and what a sampler costs beside the network evaluations that it makes."""

import pytest
import torch
from torch import Tensor

from bench.parts import objective, sampling
from bench.suite import FLOOR, Against, Comparison, Size, network_flops
from bench.timing import Workload
from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.evaluation.generate import SamplerSettings
from fastdiff.nets.unet import UNet

pytestmark = pytest.mark.timeout(900)

NETWORK = "bare network"
OVERHEAD_BATCH = 16


def _ddim(size: Size, n: int) -> Comparison:
    variants = ("uncaptured", *(("captured",) if size.ours else ()))
    captured = (Against("uncaptured", "higher", f"14 batch {n}"), Against(FLOOR, "lower"))
    ratios = {"uncaptured": (Against(FLOOR, "lower"),), "captured": captured}

    def build() -> dict[str, Workload]:
        forward, _ = network_flops(size.config.net)
        settings = SamplerSettings("ddim", size.steps)
        return {
            v: Workload(sampling(size, settings, n, captured=v == "captured"), flops=forward * n * size.steps, images=n)
            for v in variants
        }

    return Comparison("sampler", f"ddim, {size.steps} steps, batch {n}", variants, build, ratios)


def _overhead(size: Size, name: str) -> Comparison:
    """A sampling by the plain loop, beside as many calls of the network as it makes; eager."""

    def build() -> dict[str, Workload]:
        torch.manual_seed(0)
        net = UNet(size.config.net).to(size.device).requires_grad_(False).eval()
        goal, side = objective(size), size.config.net.image_size
        x = torch.randn(OVERHEAD_BATCH, side, side, 3, device=size.device).permute(0, 3, 1, 2)
        t = torch.full((OVERHEAD_BATCH,), 10.0, device=size.device)
        ts = goal.schedule.grid(size.overhead_steps)
        calls = 0

        def counting(x_t: Tensor, c_noise: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return net(x_t, c_noise)

        @torch.no_grad()
        def sample(i: int) -> None:
            SAMPLERS[name](lambda x_t, time, *_: goal.denoise(counting, x_t, time), goal.schedule, x, ts)

        @torch.no_grad()
        def bare(i: int) -> None:
            for _ in range(evaluations):
                net(x, t)

        sample(0)
        evaluations = calls
        forward, _ = network_flops(size.config.net)
        flops = forward * OVERHEAD_BATCH * evaluations
        return {
            NETWORK: Workload(bare, flops=flops, images=OVERHEAD_BATCH),
            name: Workload(sample, flops=flops, images=OVERHEAD_BATCH),
        }

    case = f"{name}, {size.overhead_steps} steps, batch {OVERHEAD_BATCH}, eager"
    return Comparison("sampler", case, (NETWORK, name), build, {name: (Against(NETWORK, "lower", "sampler"),)})


def comparisons(size: Size) -> list[Comparison]:
    return [_ddim(size, n) for n in size.sampler_batches] + [_overhead(size, name) for name in SAMPLERS]


def test_sampler(record):
    record()

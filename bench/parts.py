"""The trainer's parts, put together as `training/train.py` does, for one benchmark each."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from bench.suite import Size, image_set, network_flops
from bench.timing import Workload
from fastdiff.data.loaders import Loader, make_loader
from fastdiff.diffusion.objectives import Objective, make_objective
from fastdiff.errors import UserError
from fastdiff.evaluation.generate import Generator, SamplerSettings
from fastdiff.nets.fuse import fuse, half_parameters
from fastdiff.nets.unet import UNet
from fastdiff.training.ema import EMA
from fastdiff.training.optim import LearningRate, Update, make_update
from fastdiff.training.step import TrainStep


def objective(size: Size) -> Objective:
    """The config's own."""
    return make_objective(**size.config.diffusion.arguments)


def make_parts(size: Size, kernels: str, *, graphs: bool = False) -> tuple[nn.Module, Update]:
    """A fresh network on the device, fused with "triton", and its optimizer with the average.

    Args:
        kernels: "triton" or "torch".
        graphs: to be captured.
    """
    torch.manual_seed(0)
    model = UNet(size.config.net).to(size.device)
    network, optim = fuse(model) if kernels == "triton" else model, size.config.optim
    update = make_update(
        kernels, model, EMA(model, optim.ema_decay), weight_decay=optim.weight_decay, beta2=optim.beta2,
        half=half_parameters(network) if size.bf16 else (), graphs=graphs,
    )  # fmt: skip
    return network, update


def train_step(size: Size, *, kernels: str, compile: bool, graphs: bool = False) -> TrainStep:
    """A training step in the size's precision, channels_last."""
    model, update = make_parts(size, kernels, graphs=graphs)
    c = size.config
    return TrainStep(
        model, objective(size), update, lr=LearningRate.of(c),
        grad_clip=c.optim.grad_clip, seed=c.run.seed, bf16=size.bf16, compile=compile, graphs=graphs,
    )  # fmt: skip


@cache
def our_step(size: Size) -> TrainStep:
    """The step as `train_cifar.py` takes it by default on the size's device; one for all benchmarks, as it compiles."""
    fast = size.ours
    return train_step(size, kernels="triton" if fast else "torch", compile=fast, graphs=fast)


def loader(size: Size, kind: str) -> Loader:
    """A loader over the size's images, on its device; one that is not installed is skipped, with the reason."""
    c = size.config
    images = image_set(size.images, c.net.image_size)
    try:
        return make_loader(kind, images, batch_size=c.optim.batch_size, seed=c.run.seed, device=size.device)
    except UserError as missing:
        pytest.skip(str(missing))


def constant_batch(size: Size) -> torch.Tensor:
    """uint8 (batch, H, W, C) on the device."""
    c = size.config
    return torch.from_numpy(image_set(size.images, c.net.image_size).images[: c.optim.batch_size].copy()).to(
        size.device
    )


def training_work(size: Size, run: Callable[[int], object], *, units: float = 1.0) -> Workload:
    """A workload that trains on one batch a call."""
    _, flops = network_flops(size.config.net)
    n = size.config.optim.batch_size
    return Workload(run, flops=flops * n, images=n, units=units)


def sampling(size: Size, settings: SamplerSettings, n: int, *, captured: bool) -> Callable[[int], torch.Tensor]:
    """Each call draws the next n samples, uint8 (n, C, H, W), as `train_cifar.py` does from its averaged weights.

    Args:
        captured: replay a CUDA graph a denoising step, captured once for all calls.
    """
    torch.manual_seed(0)
    net = UNet(size.config.net).to(size.device).requires_grad_(False).eval()
    net = fuse(net) if size.ours else net
    side = size.config.net.image_size
    generator = Generator(
        net, objective(size), settings, shape=(3, side, side), batch_size=n, device=size.device, bf16=size.bf16,
        compile=size.ours, graphs=captured,
    )  # fmt: skip
    batches = generator.batches(n * 2**40, seed=0, progress=lambda done: None)  # evaluations show theirs
    return lambda i: next(batches)

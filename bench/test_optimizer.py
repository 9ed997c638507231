"""Clipping, Adam and the average over the network's own parameters, with random gradients."""

from collections.abc import Callable

import torch

from bench.parts import make_parts
from bench.suite import Against, Comparison, Size
from bench.timing import Workload
from fastdiff.nets.unet import UNet

NAIVE, TORCH, OURS = "loops over parameters", "torch fused + foreach", "ours"
# Read and written: weight, two moments, average; read: gradient (4, or 2 and a bf16 weight written).
BYTES = 36


def _naive(size: Size) -> Callable[[int], None]:
    """What a first version writes: nothing fused, an average in a loop."""
    model = UNet(size.config.net).to(size.device)
    parameters = list(model.parameters())
    adam = torch.optim.Adam(parameters, lr=size.config.optim.lr, foreach=False)
    average = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.randn_like(p)

    def update(i: int) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, size.config.optim.grad_clip, foreach=False)
        adam.step()
        with torch.no_grad():
            for mean, p in zip(average, parameters, strict=True):
                mean.mul_(size.config.optim.ema_decay).add_(p, alpha=1 - size.config.optim.ema_decay)

    return update


def _update(size: Size, kernels: str) -> Callable[[int], None]:
    _, update = make_parts(size, kernels)
    gradients = [torch.randn_like(w) for w in update.weights.values()]

    def run(i: int) -> None:
        update.begin(lr=size.config.optim.lr)
        update.add(gradients)
        update.apply(grad_clip=size.config.optim.grad_clip)

    return run


def _comparison(size: Size, case: str, variants: tuple[str, ...], *, queued: bool) -> Comparison:
    ratios = {TORCH: (Against(NAIVE, "higher"),), OURS: (Against(TORCH, "higher"), Against(NAIVE, "higher"))}
    if queued:
        ratios = {OURS: (Against(TORCH, "higher", "10"),)}
    make = {NAIVE: lambda: _naive(size), TORCH: lambda: _update(size, "torch"), OURS: lambda: _update(size, "triton")}

    def build() -> dict[str, Workload]:
        with torch.device("meta"):
            n = sum(p.numel() for p in UNet(size.config.net).parameters())
        return {name: Workload(make[name](), bytes=BYTES * n) for name in variants}

    return Comparison("optimizer", case, variants, build, ratios, queued=queued)


def comparisons(size: Size) -> list[Comparison]:
    """What the host waits for; and for the bar the device's own time, all that a captured step has of it."""
    if not size.ours:
        return [_comparison(size, "clip + Adam + EMA", (NAIVE, TORCH), queued=False)]
    return [
        _comparison(size, "clip + Adam + EMA", (NAIVE, TORCH, OURS), queued=False),
        _comparison(size, "clip + Adam + EMA, device time", (TORCH, OURS), queued=True),
    ]


def test_optimizer(record):
    record()

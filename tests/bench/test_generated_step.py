"""The network, its loss and all gradients as Inductor generates them for a GPU, run in Triton's interpreter."""

import os
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch

from bench import inductor_mock, step_variants
from fastdiff.data.pixels import normalize
from fastdiff.diffusion.objectives import make_objective
from fastdiff.model_sections import UNetConfig
from fastdiff.nets.fuse import fuse
from fastdiff.nets.unet import UNet
from kernels import launch
from tests.numerics import FACTOR, assert_as_accurate

NET = UNetConfig(
    image_size=16, channels=32, channel_mult=(1, 2), blocks_per_level=1, attention_resolutions=(8,), norm_groups=8,
    dropout=0.0,
)  # fmt: skip
BATCH, SEED = 3, 1234
# Other tiles than the rule's: a loop in the first norms of the blocks at 16x16 on the way up, and loading ahead.
AHEAD = {
    (96, 256, 8, False, False): (24, 64, 4, 1),
    (96, 256, 8, True, False): (24, 32, 4, 1),
    (64, 64, 8, False, False): (16, 64, 4, 1),
    (64, 64, 8, True, False): (16, 16, 4, 1),
}


def truth(kernels, weights, batch, *, wide, dropout):
    """Each image's loss, and gradients of their mean, in eager PyTorch, float64 if `wide`: {name: tensor}."""
    model = UNet(replace(NET, dropout=dropout))
    model.load_state_dict({name: w.float() for name, w in weights.items()})
    model = model.double() if wide else model
    network = fuse(model) if kernels == "triton" else model
    images, t, eps = batch
    x0, eps = (normalize(images).double(), eps.double()) if wide else (normalize(images), eps)
    with torch.autocast("cpu", torch.bfloat16, enabled=not wide):
        loss = make_objective("eps", schedule="ddpm-linear").loss(network, x0, t, eps)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach()} | dict(zip(names, torch.autograd.grad(loss.mean(), parameters), strict=True))


def drawn():
    """Weights, none of them zero, and a batch."""
    generator = torch.Generator().manual_seed(0)
    step = step_variants.make_step("ours", NET)
    weights = {
        name: (w.detach().float() + 0.05 * torch.randn(w.shape, generator=generator)).to(w.dtype)
        for name, w in step.update.weights.items()
    }
    images = torch.randint(0, 256, (BATCH, 16, 16, 3), dtype=torch.uint8, generator=generator)
    eps = torch.randn(BATCH, 16, 16, 3, generator=generator).permute(0, 3, 1, 2)
    return weights, (images, torch.tensor([1, 300, 1000]), eps)


@pytest.mark.skipif(not torch.__version__.startswith(inductor_mock.TORCH), reason="the counter knows other versions")
@pytest.mark.parametrize(
    ("kernels", "dropout", "tiles"),
    [("torch", 0.0, AHEAD), pytest.param("triton", 0.25, {}, marks=pytest.mark.slow)],
)
def test_the_generated_step_is_as_accurate_as_eager_pytorch(kernels, dropout, tiles, repo, tmp_path, monkeypatch):
    """Against float64 of the plain network; with dropout, whose masks our kernels alone draw, of their references."""
    weights, batch = drawn()
    monkeypatch.setattr(launch, "NORM_TILES", tiles)
    # The one number that the network draws becomes a constant, so that all draw the same masks.
    with mock.patch.object(torch, "randint", lambda *_, device, **__: torch.full((1,), SEED, device=device)):
        graphs = step_variants.graphs_of("ours", replace(NET, dropout=dropout), BATCH)
        exact = truth(kernels, weights, batch, wide=True, dropout=dropout)
        eager = truth(kernels, weights, batch, wide=False, dropout=dropout)
    assert any("AHEAD': True" in graph.code for graph in graphs) == bool(tiles)

    work = {"graphs": [(g.code, g.constants) for g in graphs], "inputs": [*weights.values(), *batch]}
    torch.save(work, tmp_path / "code.pt")
    command = [
        sys.executable,
        str(repo / "tests" / "generated.py"),
        str(tmp_path / "code.pt"),
        str(tmp_path / "out.pt"),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    results, gradients = torch.load(tmp_path / "out.pt")

    # A mean errs at most as much as the image that errs most; eager's own mean may be right by luck.
    error = (results[0].double() - exact["loss"].mean()).abs()
    assert error <= FACTOR * (eager["loss"] - exact["loss"]).abs().max(), error
    assert all(rest is None for rest in gradients[len(weights) :])  # of the batch
    for name, value in zip(weights, gradients[: len(weights)], strict=True):
        assert_as_accurate(value, eager[name], exact[name], name)

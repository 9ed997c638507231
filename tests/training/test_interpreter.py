"""Training with the Triton kernels themselves, in Triton's interpreter on a CPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.numerics import assert_as_accurate

SCRIPT = """
import json
import sys

import torch

from fastdiff.diffusion.objectives import make_objective
from fastdiff.nets.fuse import fuse
from fastdiff.nets.unet import UNet, UNetConfig
from fastdiff.training.ema import EMA
from fastdiff.training.optim import LearningRate, make_update
from fastdiff.training.step import TrainStep
from tests.numerics import Float64

net = UNetConfig(
    image_size=4, channels=16, channel_mult=(1,), blocks_per_level=1, attention_resolutions=(), norm_groups=4
)


curves = {}
for kind in ("float64", "torch", "triton"):
    torch.manual_seed(0)
    model = Float64(UNet(net)) if kind == "float64" else UNet(net)
    network = fuse(model) if kind == "triton" else model
    ema = EMA(model, 0.9)
    update = make_update("triton" if kind == "triton" else "torch", model, ema, weight_decay=0.0)
    objective = make_objective("eps", schedule="ddpm-linear", timesteps=1000, weighting="uniform")
    step = TrainStep(
        network, objective, update, lr=LearningRate(1e-3, 5), grad_clip=1.0, seed=0, bf16=False, compile=False
    )
    losses = []
    for i in range(20):
        images = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        step(images, i)
        losses.append(step.metrics.means()["loss"])
    average = torch.cat([v.flatten() for v in ema.state_dict().values()])
    curves[kind] = {"losses": losses, "average": average.tolist()}
json.dump(curves, sys.stdout)
"""


@pytest.mark.slow  # each kernel is interpreted against its contract in any case
def test_20_steps_with_the_triton_kernels_follow_the_torch_curve(repo):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(repo)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=repo, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    curves = json.loads(done.stdout)
    for name in ("losses", "average"):
        exact, plain, ours = (torch.tensor(curves[kind][name], dtype=torch.float64) for kind in curves)
        assert_as_accurate(ours.float(), plain.float(), exact, name)
    assert curves["triton"]["losses"] != curves["torch"]["losses"]

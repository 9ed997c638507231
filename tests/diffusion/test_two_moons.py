"""Few-step objectives end to end on two half circles in the plane: one step must give their shape."""

import math

import pytest
import torch
from sklearn.datasets import make_moons
from torch import nn

from fastdiff.diffusion import plan
from fastdiff.diffusion.consistency import Consistency
from fastdiff.diffusion.flow_map import FlowMap
from fastdiff.diffusion.objectives import make_objective
from fastdiff.diffusion.samplers import PLANS
from fastdiff.diffusion.tangents import ContinuousConsistency, MeanFlow

pytestmark = pytest.mark.guarantee
SIGMA_DATA, STEPS, BATCH = 0.5, 500, 128


def moons(n, seed):
    """(n, 2, 1, 1), of mean 0 and standard deviation SIGMA_DATA."""
    x = torch.tensor(make_moons(n, noise=0.03, random_state=seed)[0], dtype=torch.float32)
    return ((x - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5]) * SIGMA_DATA)[:, :, None, None]


class Net(nn.Module):
    """Told its times by slow sinusoids, as a point in the plane has no use for fast ones."""

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(2 + 16, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(128, 2))

    def forward(self, x, c_noise, span=None, dropout_seed=None):
        span = torch.zeros_like(c_noise) if span is None else span
        angles = (
            torch.stack([c_noise, span], 1).float()[:, :, None] / 1000 * torch.tensor([0.5, 1.0, 2.0, 4.0]) * math.pi
        )
        told = torch.cat([angles.sin(), angles.cos()], 2).flatten(1)
        return self.layers(torch.cat([x.flatten(1), told], 1))[:, :, None, None]


def train(net, objective, *, lr, steps=STEPS):
    data, generator = moons(20_000, seed=0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for step in range(steps):
        objective.advance(step * BATCH)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        x0 = data[torch.randint(len(data), (BATCH,), generator=generator)]
        t, eps = objective.sample_t(BATCH, generator=generator), torch.randn(x0.shape, generator=generator)
        optimizer.zero_grad()
        objective.loss(net, x0, t, eps).mean().backward()
        optimizer.step()


@torch.no_grad()
def distance(net, objective, sampler, n=2000):
    """Energy distance of one-step samples to other data: 2 E|x - y| - E|x - x'| - E|y - y'|."""
    schedule, generator = objective.schedule, torch.Generator().manual_seed(1)
    x = schedule.prior_std * torch.randn(n, 2, 1, 1, generator=generator)
    rows = PLANS[sampler](schedule, schedule.grid(1))
    x = plan.run(rows, lambda *a: objective.denoise(net, *a), x, generator=generator).flatten(1)
    y = moons(n, seed=1).flatten(1)
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


@pytest.fixture(scope="module")
def teachers():
    """Diffusion networks by objective, and how far their single steps are from the data."""
    made = {}
    for kind, schedule in (("edm", "edm"), ("flow", "flow")):
        torch.manual_seed(0)
        net, objective = Net(), make_objective(kind, schedule=schedule, sigma_data=SIGMA_DATA)
        train(net, objective, lr=2e-3)
        made[kind] = net.state_dict(), objective, distance(net, objective, "ddim")
    return made


@pytest.mark.parametrize(
    ("kind", "tuned", "at", "taught"),
    [
        ("edm", Consistency, lambda images: 1 / 32, False),
        ("edm", Consistency, lambda images: 1 / 32, True),
        ("edm", ContinuousConsistency, lambda images: min(1.0, images / (200 * BATCH)), False),
        ("edm", ContinuousConsistency, lambda images: min(1.0, images / (200 * BATCH)), True),
        ("flow", FlowMap, lambda images: 50 ** -min(1.0, images / (STEPS * BATCH)), False),
        ("flow", MeanFlow, lambda images: 0.0, False),
    ],
    ids=["consistency", "distillation", "scm", "scm-taught", "flow-map", "mean-flow"],
)
def test_one_step_is_nearer_to_the_data_than_the_teacher_s(teachers, kind, tuned, at, taught):
    weights, objective, before = teachers[kind]
    net, frozen = Net(), Net()
    for each in (net, frozen):
        each.load_state_dict(weights)

    @torch.no_grad()
    def teacher(x_t, t):
        return objective.denoise(frozen, x_t, t)

    learned = tuned(objective, at, **({"teacher": teacher} if taught else {}))
    train(net, learned, lr=5e-4)
    after = distance(net, learned, "flow-map" if kind == "flow" else "consistency")
    print(f"{before:.4f} -> {after:.4f}")
    assert after < before / 4

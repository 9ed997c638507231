"""Flow maps of Gaussian data, whose average velocity and discrete optimum are known exactly."""

import pytest
import torch

from fastdiff.diffusion.flow_map import FlowMap
from fastdiff.diffusion.objectives import make_objective
from fastdiff.errors import UserError
from tests.diffusion.truths import ALL, MEAN, STD, gaussian_flow

FLOW = ALL["flow"]


def build(a):
    return FlowMap(make_objective("flow", schedule="flow"), lambda images: a)


def velocity(x, t):
    """E[eps - x0 | x_t]."""
    variance = ((1 - t) * STD) ** 2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def average(x_t, x_r, t, r):
    return torch.where(t > r, (x_t - x_r) / (t - r).clamp(min=1e-9), velocity(x_t, t))


def optimum(x, t, r, a, steps=300):
    """The average velocity by Euler's steps on the grid r + (1 - a)^j (t - r), the last of them to r."""
    y, s = x, t
    for _ in range(steps):
        following = r + (1 - a) * (s - r)
        y, s = y - (s - following) * velocity(y, s), following
    return average(x, y - (s - r) * velocity(y, s), t, r)


def exact(x, t, r):
    return average(x, gaussian_flow(FLOW, x, t, r), t, r)


def times():
    t, r = torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(0).values.flip(0)
    return torch.stack([t, r], 1)


def gradients(a, map_, t):
    """Of the loss by an error of slope and offset in the first evaluation; exact, by four pixels with all moments."""
    signs = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    x0, eps = (v.expand(len(t), 1, 1, 4) for v in (MEAN + STD * signs[0], signs[1]))
    off = torch.zeros(2, len(t), 1, 1, 1, dtype=torch.float64, requires_grad=True)

    def network(x, c_noise, span):
        now = (c_noise / 1000)[:, None, None, None]
        return map_(x, now, now - (span / 1000)[:, None, None, None]) + off[0] * x + off[1]

    return torch.autograd.grad(build(a).loss(network, x0, t, eps).sum(), off)[0].abs() * a**2


@pytest.mark.parametrize("a", [1.0, 0.5, 0.1])
def test_training_is_stationary_at_the_optimum_of_its_ratio(a):
    t = times()
    assert gradients(a, lambda x, t, r: optimum(x, t, r, a), t).max() < 1e-9
    assert gradients(a, exact, t).max() > 1e-3


def test_the_optimum_is_the_velocity_at_ratio_1_and_tends_to_the_average_velocity():
    t, r = (v[:, None] for v in times().unbind(1))
    x = torch.linspace(-1, 1, 5, dtype=torch.float64).expand(50, 5)
    assert (optimum(x, t, r, 1.0, steps=1) - velocity(x, t)).abs().max() < 1e-12
    errors = [(optimum(x, t, r, a, steps=2000) - exact(x, t, r)).abs().max() for a in (0.02, 0.01)]
    assert errors[0] < 0.05
    assert (errors[0] / errors[1]).log2().item() == pytest.approx(1.0, abs=0.1)


def test_the_target_passes_no_gradient_and_pairs_of_times_are_in_order():
    learned, weight = build(0.25), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    grads = []

    def network(x, c_noise, span):
        grads.append(torch.is_grad_enabled())
        return weight * x

    t = learned.sample_t(1000, generator=torch.Generator().manual_seed(0))
    assert t.shape == (1000, 2)
    assert (t[:, 1] <= t[:, 0]).all()
    x0 = torch.zeros(1000, 1, 1, 2, dtype=torch.float64)
    assert learned.loss(network, x0, t, x0 + 1).isfinite().all()
    assert grads == [True, False]


def test_without_an_end_the_estimate_is_the_tangent_s():
    learned, seen = build(0.5), []

    def network(x, c_noise, span):
        seen.append(span.tolist())
        return torch.ones_like(x)

    x, t, r = torch.zeros(2, 1, 1, 1), torch.tensor(0.8).double(), torch.tensor(0.3).double()
    learned.denoise(network, x, t)
    assert learned.denoise(network, x, t, r).flatten().tolist() == pytest.approx([-0.8] * 2)
    assert seen == [[0.0, 0.0], pytest.approx([500.0, 500.0])]


def test_other_objectives_are_refused():
    with pytest.raises(UserError, match="--objective flow on --schedule flow"):
        FlowMap(make_objective("flow", schedule="cosine"), lambda images: 1.0)

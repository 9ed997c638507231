"""Objectives with the network's exact derivative: on Gaussian data, and as the limits of those that take a step."""

import pytest
import torch

from fastdiff.diffusion.consistency import Consistency
from fastdiff.diffusion.flow_map import FlowMap
from fastdiff.diffusion.objectives import make_objective
from fastdiff.diffusion.tangents import ContinuousConsistency, MeanFlow, along
from fastdiff.errors import UserError
from tests.diffusion.test_flow_map import exact, times
from tests.diffusion.truths import ALL, MEAN, STD, gaussian_denoise


@pytest.fixture(scope="module", autouse=True)
def imported():
    """PyTorch's first forward derivative imports for seconds."""
    weight = torch.ones(1, requires_grad=True)
    along(lambda x: weight * x.sin(), (torch.ones(1),), (torch.ones(1),))


def four_pixels(n):
    """Images and noise with all moments of the data's and the noise's up to the second: a mean over them is exact."""
    signs = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    return (v.expand(n, 1, 1, 4) for v in (MEAN + STD * signs[0], signs[1]))


def flow():
    return make_objective("flow", schedule="flow")


def edm(schedule="edm", **options):
    return ContinuousConsistency(make_objective("edm", schedule=schedule), lambda images: 1.0, **options)


def test_mean_flow_is_stationary_at_the_average_velocity():
    t = times()
    x0, eps = four_pixels(len(t))
    off = torch.zeros(2, len(t), 1, 1, 1, dtype=torch.float64, requires_grad=True)

    def network(x, c_noise, span, wrong=1.0):
        now = (c_noise / 1000)[:, None, None, None]
        return wrong * exact(x, now, now - (span / 1000)[:, None, None, None]) + off[0] * x + off[1]

    def gradient(**options):
        learned = MeanFlow(flow(), lambda images: 0.0)
        loss = learned.loss(lambda *a, **k: network(*a, **k, **options), x0, t, eps)
        return torch.autograd.grad(loss.sum(), off)[0].abs().max()

    assert gradient() < 1e-9
    assert gradient(wrong=1.01) > 1e-3


def test_a_flow_map_s_gradient_tends_to_mean_flow_s():
    t = times()
    x0, eps = four_pixels(len(t))
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)

    def network(x, c_noise, span):
        return (weight[0] * x + weight[1] * (c_noise + 0.5 * span)[:, None, None, None] / 1000).sin()

    def gradient(learned):
        return torch.autograd.grad(learned.loss(network, x0, t, eps).sum(), weight)[0]

    limit, errors = gradient(MeanFlow(flow(), lambda images: 0.0)), []
    for a in (0.02, 0.01):
        near = a * gradient(FlowMap(flow(), lambda images, a=a: a))  # FlowMap divides by a before it squares
        errors.append((near - limit).norm() / limit.norm())
    assert errors[0] < 0.05
    assert (errors[0] / errors[1]).log2().item() == pytest.approx(1.0, abs=0.1)


def test_a_quarter_of_mean_flow_s_pairs_is_one_time_twice():
    t = MeanFlow(flow(), lambda images: 0.0).sample_t(4000, generator=torch.Generator().manual_seed(0))
    assert (t[:, 1] <= t[:, 0]).all()
    assert (t[:, 1] == t[:, 0]).double().mean().item() == pytest.approx(0.29, abs=0.03)  # and where r was above t


def consistent(learned, t):
    """The network whose estimate is the end of the exact flow: f = MEAN + STD / sqrt(STD^2 + rho^2) (x - MEAN)."""
    schedule, sd = learned.schedule, learned.sigma_data

    def network(y, c_noise):
        time = t if c_noise is None else c_noise
        rho = (time / 1000 * torch.tensor(80.0 / 0.002).log() + torch.tensor(0.002).log()).exp()[:, None, None, None]
        d = (rho**2 + sd**2).sqrt()
        f = MEAN + STD / (STD**2 + rho**2).sqrt() * (d * y - MEAN)
        return (f - sd**2 / d * y) / (rho * sd / d)

    assert schedule.name == "edm"
    return network


T = torch.tensor([0.05, 0.3, 1.0, 5.0, 40.0, 80.0], dtype=torch.float64)


def test_scm_taught_by_the_exact_flow_is_at_rest_at_the_consistency_function():
    def teacher(x, t):
        return gaussian_denoise(ALL["edm"])(x, t.reshape(-1, 1, 1, 1))

    x0, eps = four_pixels(len(T))
    learned = edm(teacher=teacher)
    assert learned.loss(consistent(learned, T), x0, T, eps).max() < 1e-10
    wrong = learned.loss(lambda y, c: 1.02 * consistent(learned, T)(y, c), x0, T, eps)
    assert (wrong > 1e-7).all()


def test_scm_s_gradient_without_a_norm_is_stationary_there_on_data(monkeypatch):
    monkeypatch.setattr("fastdiff.diffusion.tangents.NORM", 1e9)  # the norm would weigh images apart
    x0, eps = four_pixels(len(T))
    off = torch.zeros(2, len(T), 1, 1, 1, dtype=torch.float64, requires_grad=True)
    learned = edm()

    def gradient(wrong):
        network = consistent(learned, T)
        loss = learned.loss(lambda y, c: wrong * network(y, c) + off[0] * y + off[1], x0, T, eps)
        return 1e9 * torch.autograd.grad(loss.sum(), off)[0].abs().amax((0, 2, 3, 4))

    assert (gradient(1.0) < 1e-6).all()
    assert (gradient(1.01) > 1e-5).all()


@pytest.mark.parametrize("taught", [False, True])
def test_consistency_s_gradient_tends_to_scm_s(monkeypatch, taught):
    """Both pull the network along the derivative of its estimate; they weigh noise levels apart."""
    monkeypatch.setattr("fastdiff.diffusion.tangents.NORM", 1e9)
    x0, eps = four_pixels(len(T))
    weight = torch.full((len(T), 1, 1, 1), 0.3, dtype=torch.float64, requires_grad=True)

    def network(y, c_noise):
        return (weight * y + c_noise[:, None, None, None] / 1000).sin()

    def teacher(x, t):
        return gaussian_denoise(ALL["edm"])(x, t.reshape(-1, 1, 1, 1))

    options = {"teacher": teacher} if taught else {}

    def gradient(learned):
        return torch.autograd.grad(learned.loss(network, x0, T, eps).sum(), weight)[0].flatten()

    limit = 1e9 * gradient(edm(**options))
    sd, huber = 0.5, 1e6  # so large that the distance is the square
    cos, sin = (T / sd).atan().cos(), (T / sd).atan().sin()
    errors = []
    for q in (1e4, 2e4):
        step = Consistency(edm().kind, lambda images, q=q: 1 / q, huber_c=huber, **options)
        _, r = step.earlier(T)
        # d f / d rho is (d f / d angle) cos^2 / sd, and dF passes sd sin of it; the loss is 1 / (2 c) of the square.
        scale = sd * sin * cos**2 / sd / cos
        difference = huber * gradient(step) / scale - limit / 2
        errors.append((difference / limit.abs().max()).abs().max())
        assert (T - r > 0).all()
    assert errors[0] < 0.01
    assert (errors[0] / errors[1]).log2().item() == pytest.approx(1.0, abs=0.2)


def test_scm_s_ramp_lets_the_derivative_come_in(monkeypatch):
    """Without it the network is drawn to the velocity alone, as in diffusion."""
    monkeypatch.setattr("fastdiff.diffusion.tangents.NORM", 1e9)
    x0, eps = four_pixels(len(T))
    learned = ContinuousConsistency(make_objective("edm", schedule="edm"), lambda images: images / 10)

    def network(y, c_noise):
        return 0.3 * y + c_noise[:, None, None, None] / 1000

    losses = []
    for images in (0, 5, 10):
        learned.advance(images)
        losses.append(1e18 * learned.loss(network, x0, T, eps))
    cos = (T / 0.5).atan().cos()[:, None, None, None]
    target = learned.target(x0, T, eps)
    y, c_noise = learned.precondition(learned.add_noise(x0, T, eps), T)
    pull = 0.5 * cos**2 * (network(y, c_noise) - target)
    assert (losses[0] - pull.square().mean((1, 2, 3))).abs().max() < 1e-6
    bend = losses[2] + losses[0] - 2 * losses[1]  # g is linear in the ramp, and so its square is no line
    assert (bend > 1e-6).all()


def test_scm_sees_fewer_extreme_levels_with_a_teacher():
    spreads = []
    for options in ({}, {"teacher": lambda x, t: x}):
        learned = edm(**options)
        t = learned.sample_t(4000, generator=torch.Generator().manual_seed(0))
        spreads.append(t.log().std().item())
    assert spreads == [pytest.approx(1.8, abs=0.1), pytest.approx(1.4, abs=0.1)]


@pytest.mark.parametrize("schedule", ["edm", "cosine", "flow", "vp-sde"])
def test_scm_s_loss_is_finite_and_no_gradient_passes_its_target(schedule):
    learned = edm(schedule)
    t = learned.sample_t(500, generator=torch.Generator().manual_seed(0))
    t[0], t[1] = learned.schedule.t_min, learned.schedule.t_max
    x0, eps = (v.float() for v in four_pixels(500))
    weight = torch.tensor(0.5, requires_grad=True)
    loss = learned.loss(lambda y, c: weight * y.sin(), x0, t, eps)
    assert loss.isfinite().all()
    assert loss.dtype == torch.float32
    learned.advance(0)
    (gradient,) = torch.autograd.grad(loss.sum(), weight)
    assert gradient.isfinite()
    # |g| is at most 1, and the loss its square.
    assert loss.max() <= 1.0


def test_scm_needs_the_objective_edm():
    with pytest.raises(UserError, match="--few-step scm needs --objective edm, but this is flow"):
        ContinuousConsistency(flow(), lambda images: 1.0)

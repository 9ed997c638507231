"""Consistency models of Gaussian data, whose consistency function and discrete optimum are known exactly."""

import math

import pytest
import torch

from fastdiff.diffusion.consistency import Consistency
from fastdiff.diffusion.objectives import make_objective
from tests.diffusion.truths import ALL, MEAN, STD, gaussian_denoise, gaussian_flow, gaussian_marginal

Q = 4.0


def build(schedule="edm", kind="x0", q=Q, boundary=0.0, **options):
    objective = make_objective(
        kind, schedule=schedule.removesuffix("-zero"), zero_terminal_snr=schedule.endswith("-zero")
    )
    return Consistency(objective, lambda images: 1 / q, boundary=boundary, **options)


@pytest.mark.parametrize("schedule", ["edm", "cosine", "flow"])
def test_the_estimate_of_x0_is_x_t_itself_at_t_0(schedule):
    learned, plain = build(schedule, boundary=0.2), build(schedule)
    t = learned.schedule.t_of_log_snr(torch.tensor([8.0, -2 * math.log(0.2), -8.0], dtype=torch.float64))
    rho = (learned.schedule.sigma(t) / learned.schedule.alpha(t))[:, None, None, None]
    x0 = torch.linspace(-1, 1, 4, dtype=torch.float64).expand(3, 1, 1, 4)
    x_t = x0 * learned.schedule.alpha(t)[:, None, None, None]
    f, x0_hat = (each.denoise(lambda x, c: (3 * x).cos(), x_t, t) for each in (learned, plain))
    assert (f - (0.04 * x0 + rho**2 * x0_hat) / (0.04 + rho**2)).abs().max() < 1e-12
    assert (f - x0)[0].abs().max() < 0.02 < (x0_hat - x0)[0].abs().max()
    assert (f - x0_hat)[2].abs().max() < 1e-3
    assert build(schedule, "edm", boundary=0.2).boundary == 0


def draw(n, pixels=400, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x0 = MEAN + STD * torch.randn(n, 1, 1, pixels, dtype=dtype, generator=generator)
    return x0, torch.randn(x0.shape, dtype=dtype, generator=generator)


def chain(learned, start=80.0):
    """The times that training compares, from `start` down to 0 through each one's r."""
    times = [start]
    while times[-1] > 0:
        times.append(learned.earlier(torch.tensor([times[-1]], dtype=torch.float64))[0].item())
    return torch.tensor(times[-2::-1], dtype=torch.float64)  # rising, without 0


class Slopes(torch.nn.Module):
    """x0_hat = MEAN + a_k (x_t - MEAN) at time k, on schedule edm."""

    def __init__(self, learned, times, slopes):
        super().__init__()
        self.c_noise, self.c_in = learned.kind.c_noise(times), learned.schedule.c_in(times)
        self.slopes = torch.nn.Parameter(slopes.clone())

    def forward(self, x, c_noise):
        k = (c_noise[:, None] - self.c_noise).abs().argmin(1)
        return MEAN + self.slopes[k, None, None, None] * (x / self.c_in[k, None, None, None] - MEAN)


def optimum(times):
    """prod_i (s^2 + t_{i-1} t_i) / (s^2 + t_i^2), with t_0 = 0."""
    before = torch.cat([times.new_zeros(1), times[:-1]])
    return ((STD**2 + before * times) / (STD**2 + times**2)).cumprod(0)


def gradient(learned, times, slopes):
    """Of the loss, exact: four pixels have the data's and the noise's moments up to the second."""
    signs = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    x0, eps = (v.expand(len(times), 1, 1, 4) for v in (MEAN + STD * signs[0], signs[1]))
    model = Slopes(learned, times, slopes)
    loss = learned.loss(model, x0, times, eps)
    return torch.autograd.grad(loss.sum(), model.slopes)[0] * learned.huber_c


def test_training_is_stationary_at_the_discrete_optimum_and_nowhere_near_the_exact_function():
    learned = build(huber_c=1e3)  # the square of the distance, whose optimum is known
    times = chain(learned)
    exact = STD / (STD**2 + times**2).sqrt()
    assert len(times) > 10
    assert 0.1 < (1 - optimum(times) / exact)[-1] < 0.4
    stationary, pushed = (gradient(learned, times, slopes).abs() for slopes in (optimum(times), exact))
    assert (stationary < 1e-7).all()
    assert (pushed[1:] > 100 * stationary[1:]).all()


@pytest.mark.parametrize(("q", "bias"), [(16, -0.0635), (64, -0.0150), (256, -0.0037)])
def test_a_larger_q_leaves_less_of_the_bias(q, bias):
    times = chain(build(q=q))
    assert (optimum(times)[-1] * (STD**2 + 80.0**2) ** 0.5 / STD - 1).item() == pytest.approx(bias, rel=0.02)


def teacher(schedule):
    def denoise(x, t):
        t = t.reshape(-1, 1, 1, 1)
        return gaussian_denoise(schedule)(x, t)

    return denoise


def test_distillation_by_euler_s_step_has_the_same_optimum():
    learned = build(teacher=teacher(ALL["edm"]))
    times = chain(learned)
    x0, eps = draw(len(times))
    exact = STD / (STD**2 + times**2).sqrt()
    at_optimum, off = (learned.loss(Slopes(learned, times, s), x0, times, eps) for s in (optimum(times), exact))
    assert at_optimum.max() < 1e-12
    assert (off > 10 * at_optimum).all()


def consistency_function(learned):
    """The network of kind x0 that is the end of the exact flow."""

    def exact(x, c_noise):
        log_t = c_noise * (math.log(80.0 / 0.002) / 1000) + math.log(0.002)
        t = log_t.exp()
        x_t = x / learned.schedule.c_in(t)[:, None, None, None]
        return MEAN + (STD / (STD**2 + t**2).sqrt())[:, None, None, None] * (x_t - MEAN)

    return exact


@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_distillation_s_loss_at_the_exact_function_falls_with_the_step(heun, order):
    t = torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64)
    x0, eps = draw(3)
    losses = []
    for q in (32.0, 64.0):
        learned = build(q=q, teacher=teacher(ALL["edm"]), heun=heun, huber_c=1e-12)
        losses.append(learned.loss(consistency_function(learned), x0, t, eps))
    assert ((losses[0] / losses[1]).log2() - order).abs().max() < 0.2


def way_error(learned, t, rho):
    """Largest error of x_r after the steps of the exact teacher, in standard deviations of the exact flow's x_r."""
    x0, eps = draw(len(t))
    r, rho_r = learned.earlier(rho)
    x_t = learned.add_noise(x0, t, eps)
    x_r = learned._led(x_t, t, r, rho, rho_r)
    t, r = (each[:, None, None, None] for each in (t, r))
    _, spread = gaussian_marginal(learned.schedule, r)
    return ((x_r - gaussian_flow(learned.schedule, x_t, t, r)) / spread).abs().amax((1, 2, 3))


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize(("schedule", "q"), [("edm", 4.0), ("cosine", 4.0), ("cosine", 1.5)])
def test_several_steps_of_the_teacher_near_its_flow_s_end(schedule, q, heun):
    rho = torch.tensor([3.0, 30.0], dtype=torch.float64)
    errors = []
    for n in (8, 16):
        learned = build(schedule, q=q, teacher=teacher(ALL[schedule]), heun=heun, teacher_steps=n)
        errors.append(way_error(learned, learned.schedule.t_of_log_snr(-2.0 * rho.log()), rho))
    assert ((errors[0] / errors[1]).log2() - (2 if heun else 1)).abs().max() < 0.3


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_the_first_step_from_above_80_is_euler_s(schedule, n, heun):
    learned = build(schedule, q=2.0, teacher=teacher(ALL[schedule]), heun=heun, teacher_steps=n)
    t = torch.tensor([learned.schedule.t_max * 0.99999], dtype=torch.float64)
    assert way_error(learned, t, torch.tensor([80.0], dtype=torch.float64)) < 1e-3


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("schedule", sorted(ALL))
def test_a_teacher_is_asked_at_times_of_the_schedule_and_about_no_mask(schedule, heun):
    asked = []

    def denoise(x_t, t):
        asked.append(t)
        assert x_t.isfinite().all()
        return 0.1 * x_t

    learned = build(schedule, teacher=denoise, heun=heun, teacher_steps=4)
    low, high = learned.schedule.t_min, learned.schedule.t_max
    t = torch.tensor([low, low + 1e-3 * (high - low), 0.5 * (low + high), high], dtype=torch.float64)
    x0, eps = draw(4, 4)
    seed = torch.tensor([1])
    loss = learned.loss(lambda x, c, dropout_seed: 0.1 * torch.tanh(x), x0, t, eps, dropout_seed=seed)
    assert loss.isfinite().all()
    times = torch.stack(asked)
    assert len(times) == (8 if heun else 4)
    assert low <= times.min() < times.max() <= high


def test_the_teacher_s_steps_are_even_in_the_root_of_rho():
    seen = []

    def denoise(x, t):
        seen.append(t)
        return x

    learned = build("edm", q=2.0, teacher=denoise, teacher_steps=4)
    rho = torch.tensor([80.0, 40.0], dtype=torch.float64)
    r, rho_r = learned.earlier(rho)
    learned._led(torch.zeros(2, 1, 1, 1, dtype=torch.float64), rho, r, rho, rho_r)
    roots = torch.stack([*seen, r]).sqrt()
    assert (roots.diff(dim=0) - (roots[-1] - roots[0]) / 4).abs().max() < 1e-9


def test_where_r_is_0_the_target_is_the_image_itself():
    learned, seen = build(huber_c=1e-9), []
    x0, eps = draw(2)
    t = torch.tensor([0.0021, 0.1], dtype=torch.float64)  # of both (t - r) / t is above 1

    def network(x, c_noise):
        seen.append((x, c_noise))
        return 0.3 * x

    loss = learned.loss(network, x0, t, eps)
    estimate = learned.denoise(network, learned.add_noise(x0, t, eps), t)
    expected = (estimate - x0).square().mean((1, 2, 3)).sqrt() / t
    assert (loss - expected).abs().max() < 1e-6
    assert all(c.isfinite().all() for _, c in seen)
    _, r = learned.earlier(t)
    assert torch.equal(learned.add_noise(x0, r, eps), x0)


def test_no_gradient_flows_through_the_target_nor_to_the_teacher():
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x0, eps = draw(4)
    t = torch.tensor([1.0, 2.0, 3.0, 40.0], dtype=torch.float64)

    def network(x, c_noise):
        return weight * x.sin()

    for led in (None, lambda x_t, t: weight * x_t):
        learned = build(teacher=led, huber_c=0.1)
        got = torch.autograd.grad(learned.loss(network, x0, t, eps).sum(), weight)[0]
        r, rho_r = learned.earlier(t)
        x_t = learned.add_noise(x0, t, eps)
        x_r = learned.add_noise(x0, r, eps) if led is None else learned._step(x_t, t, r)
        target = learned.denoise(network, x_r, r).detach()
        square = (learned.denoise(network, x_t, t) - target).square().mean((1, 2, 3))
        expected = torch.autograd.grad((((square + 0.01).sqrt() - 0.1) / (t - rho_r)).sum(), weight)[0]
        assert got.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("boundary", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("schedule", sorted(ALL))
def test_the_loss_is_finite_at_all_times_of_every_schedule(schedule, dtype, boundary):
    learned = build(schedule, q=256.0, boundary=boundary)
    low, high = learned.schedule.t_min, learned.schedule.t_max
    t = learned.sample_t(1000, generator=torch.Generator().manual_seed(0))
    t[0], t[1] = low, high
    assert (t >= low).all()
    assert (t <= high).all()
    x0, eps = draw(1000, 4, dtype)
    loss = learned.loss(lambda x, c: 0.1 * torch.tanh(x), x0, t, eps)
    assert loss.dtype == dtype
    assert loss.isfinite().all()
    assert (loss >= 0).all()


@pytest.mark.parametrize("schedule", ["cosine", "flow", "subvp-sde"])
def test_on_any_schedule_it_is_that_of_the_rescaled_image(schedule):
    other, edm = build(schedule, "edm"), build("edm", "edm")
    t = other.schedule.t_of_log_snr(torch.linspace(4.0, -6.0, 9, dtype=torch.float64))
    rho = other.schedule.sigma(t) / other.schedule.alpha(t)
    x0, eps = draw(9)

    def network(x, c_noise):
        return x.sin()  # blind for the time, which the schedules number differently

    assert (other.loss(network, x0, t, eps) - edm.loss(network, x0, rho, eps)).abs().max() < 1e-9

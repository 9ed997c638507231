import itertools
import math

import pytest
import torch

from fastdiff.diffusion.objectives import OBJECTIVES, make_objective
from fastdiff.diffusion.schedules import DISCRETE, SCHEDULES, make_schedule
from fastdiff.diffusion.weightings import WEIGHTINGS
from fastdiff.errors import UserError

ZERO = [f"{name}-zero" for name in DISCRETE]
NAMES = [*SCHEDULES, *ZERO]
NEED_SIGNAL = [kind for kind, objective in OBJECTIVES.items() if objective.needs_signal]
UNDEFINED = set(itertools.product(NEED_SIGNAL, ("flow", *ZERO)))
CASES = [case for case in itertools.product(OBJECTIVES, NAMES) if case not in UNDEFINED]


def build(kind, name, **options):
    """An objective on a schedule of 1000 steps or on a continuous one; `-zero` stands for --zero-terminal-snr."""
    return make_objective(kind, schedule=name.removesuffix("-zero"), zero_terminal_snr=name in ZERO, **options)


def draw(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(n, 3, 4, 4, dtype=torch.float64, generator=generator) * 2 - 1
    return x0, torch.randn(x0.shape, dtype=torch.float64, generator=generator)


def levels(schedule, n=64):
    """n times (float64) over all that a network is asked, both ends included."""
    t = schedule.time_at(torch.linspace(0, 1, n, dtype=torch.float64))
    t[0], t[-1] = schedule.t_min, schedule.t_max
    return t


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_exact_target_has_zero_loss_and_recovers_x0(kind, name):
    objective = build(kind, name)
    schedule = objective.schedule
    x0, eps = draw()
    t = levels(schedule)
    target = objective.target(x0, t, eps)
    x_t = objective.add_noise(x0, t, eps)
    seen = {}

    def exact(x, c_noise):
        seen.update(x=x, c_noise=c_noise)
        return target

    assert torch.equal(objective.loss(exact, x0, t, eps), torch.zeros(64, dtype=torch.float64))
    if kind != "edm":
        assert torch.equal(seen["x"], schedule.c_in(t)[:, None, None, None] * x_t)
    assert torch.equal(seen["c_noise"], schedule.c_noise(t))
    # Rounding in x_t, of size sigma, is magnified by 1 / alpha on the way back, unless x0 is predicted more directly.
    magnified = 1e-15 * schedule.sigma(t) / schedule.alpha(t) if kind in NEED_SIGNAL else 0.0
    error = (objective.denoise(exact, x_t, t) - x0).abs().amax((1, 2, 3))
    assert (error <= 1e-12 + magnified).all()


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_one_time_for_all_images_is_the_same_as_one_each(kind, name):
    objective = build(kind, name)
    x, _ = draw(3)
    t = objective.schedule.time_at(torch.tensor(0.5, dtype=torch.float64))
    assert torch.equal(
        objective.denoise(lambda x, c: x.sin() * c[:, None, None, None], x, t),
        objective.denoise(lambda x, c: x.sin() * c[:, None, None, None], x, t.expand(3)),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "uniform"])
def test_a_weighting_is_one_loss_whatever_is_predicted(name, weighting):
    """Of one estimate of x0, which each objective's network puts in its own way."""
    x0, eps = draw()
    x0_hat = x0 + 0.1 * draw(seed=1)[1]
    losses = {}
    for kind in OBJECTIVES:
        if (kind, name) in UNDEFINED:
            continue
        objective = build(kind, name, weighting=weighting)
        t = levels(objective.schedule)[1:-1]  # at the ends the weight is 0 or the error of the prediction is infinite
        a, b, noise = x0[: len(t)], x0_hat[: len(t)], eps[: len(t)]
        x_t = objective.add_noise(a, t, noise)
        # The output that implies x0_hat: that of an image x0_hat and the noise that makes x_t of it.
        alpha, sigma = (f(t)[:, None, None, None] for f in (objective.schedule.alpha, objective.schedule.sigma))
        prediction = objective.target(b, t, (x_t - alpha * b) / sigma)
        torch.testing.assert_close(objective.to_x0(prediction, x_t, t), b, rtol=1e-9, atol=1e-9)
        losses[kind] = objective.loss(lambda x, c, prediction=prediction: prediction, a, t, noise)
        # The definition itself: the weight of the image's error.
        log_w = WEIGHTINGS[weighting](objective.schedule.log_snr(t), gamma=5.0, sigma_data=0.5)
        expected = log_w.exp() * (a - b).square().flatten(1).mean(1)
        torch.testing.assert_close(losses[kind], expected, rtol=1e-8, atol=0)
    assert len(losses) >= 4


def test_the_weightings_are_the_papers():
    log_snr = torch.linspace(-12, 12, 49, dtype=torch.float64)
    snr = log_snr.exp()
    sigma = snr**-0.5
    expected = {
        "image": torch.ones_like(snr),
        "snr": snr,
        "truncated-snr": snr.clamp(min=1),
        "min-snr": snr.clamp(max=5),
        "edm": (sigma**2 + 0.25) / (sigma * 0.5) ** 2,
        "sigmoid": snr / (1 + (log_snr - 2).exp()),
    }
    assert expected.keys() | {"uniform"} == WEIGHTINGS.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(WEIGHTINGS[name](log_snr, gamma=5.0, sigma_data=0.5).exp(), weight)


@pytest.mark.parametrize(
    ("kind", "weighting"), [("eps", "snr"), ("score", "snr"), ("edm", "edm"), ("x0", "image")], ids=lambda value: value
)
def test_some_weightings_are_the_plain_error_of_some_objectives(kind, weighting):
    objective = build(kind, "ddpm-linear", weighting=weighting)
    t = levels(objective.schedule)
    torch.testing.assert_close(objective.weight(t), torch.ones_like(t))
    assert torch.equal(build(kind, "ddpm-linear").weight(t), torch.ones_like(t))
    v = build("v", "ddpm-linear")
    log_snr = v.schedule.log_snr(t)
    torch.testing.assert_close(v.log_gain(log_snr).exp(), 1 / (log_snr.exp() + 1))  # so that uniform is SNR + 1


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_and_estimate_are_finite_in_float32_over_all_times(kind, name, weighting):
    objective = build(kind, name, weighting=weighting)
    schedule = objective.schedule
    x0, eps = (x.float() for x in draw(256))
    t = levels(schedule, 256)
    for times in (t, t.float(), torch.zeros(256)):  # no network is asked at t = 0, but 0 * inf would hide elsewhere too
        loss = objective.loss(lambda x, c: 0.1 * torch.tanh(x), x0, times, eps)
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()
        x0_hat = objective.denoise(lambda x, c: 0.1 * torch.tanh(x), schedule.prior_std * eps, times)
        assert x0_hat.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_edm_s_network_has_input_and_target_of_unit_variance(name):
    objective = build("edm", name, sigma_data=0.3)
    generator = torch.Generator().manual_seed(0)
    x0 = 0.3 * torch.randn(16, 1, 200, 200, dtype=torch.float64, generator=generator)
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    t = levels(objective.schedule, 16)
    x_in, _ = objective.precondition(objective.add_noise(x0, t, eps), t)
    limit = 5 * (2 / 40_000) ** 0.5  # standard errors of a variance
    assert (x_in.var((1, 2, 3)) - 1).abs().max() < limit
    assert (objective.target(x0, t, eps).var((1, 2, 3)) - 1).abs().max() < limit


@pytest.mark.parametrize(("kind", "name"), [("x0", "cosine"), ("edm", "edm")])
def test_the_time_scale_multiplies_the_number_that_the_network_is_given_alone(kind, name):
    scaled, plain = build(kind, name, time_scale=0.01), build(kind, name)
    x, _ = draw()
    t = levels(plain.schedule)
    (x_in, c_noise), (plain_x_in, plain_c_noise) = scaled.precondition(x, t), plain.precondition(x, t)
    assert torch.equal(x_in, plain_x_in)
    assert torch.equal(c_noise, 0.01 * plain_c_noise)


def test_edm_is_the_paper_s_preconditioning():
    """Karras et al. 2022, table 1, where alpha = 1."""
    objective = build("edm", "edm", weighting="edm")
    x, f = draw()
    sigma = levels(objective.schedule)
    s = sigma[:, None, None, None]
    c_skip, c_out, c_in = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt(), 1 / (s**2 + 0.25).sqrt()
    torch.testing.assert_close(objective.to_x0(f, x, sigma), c_skip * x + c_out * f)
    torch.testing.assert_close(objective.precondition(x, sigma)[0], c_in * x)
    x0, n = draw(seed=2)
    torch.testing.assert_close(objective.target(x0, sigma, n), (x0 - c_skip * (x0 + s * n)) / c_out)


def test_on_any_schedule_edm_is_that_of_the_rescaled_image():
    edm, vp = build("edm", "edm"), build("edm", "vp-sde")
    x0, eps = draw()
    t = levels(vp.schedule)
    sigma = vp.schedule.sigma(t) / vp.schedule.alpha(t)
    x_t, f = vp.add_noise(x0, t, eps), draw(seed=3)[1]
    scaled = x_t / vp.schedule.alpha(t)[:, None, None, None]
    torch.testing.assert_close(vp.to_x0(f, x_t, t), edm.to_x0(f, scaled, sigma))
    torch.testing.assert_close(vp.precondition(x_t, t)[0], edm.precondition(scaled, sigma)[0])
    torch.testing.assert_close(vp.target(x0, t, eps), edm.target(x0, sigma, eps))


def test_flow_s_target_is_the_velocity_of_its_schedule():
    objective = build("flow", "flow")
    x0, eps = draw()
    t = levels(objective.schedule)
    d_alpha, d_sigma = (f(t)[:, None, None, None] for f in (objective.schedule.d_alpha, objective.schedule.d_sigma))
    assert torch.equal(objective.target(x0, t, eps), d_alpha * x0 + d_sigma * eps)


class AffineAtEachLevel(torch.nn.Module):
    """output = a_k x + b_k at noise level k: holds the best estimate for Gaussian data, which is affine."""

    def __init__(self, c_noise):
        super().__init__()
        self.c_noise = c_noise
        self.a, self.b = (torch.nn.Parameter(torch.zeros(len(c_noise), dtype=torch.float64)) for _ in range(2))

    def forward(self, x, c_noise):
        k = (c_noise[:, None] - self.c_noise).abs().argmin(1)
        return self.a[k, None, None, None] * x + self.b[k, None, None, None]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_training_on_gaussian_data_reaches_the_optimum(kind, name):
    objective = build(kind, name)
    schedule, mean, std = objective.schedule, 0.3, 0.5
    t = levels(schedule, 10)[1:-1]
    model = AffineAtEachLevel(schedule.c_noise(t))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)

    def batch(pixels):
        x0 = mean + std * torch.randn(len(t), 1, pixels, 1, dtype=torch.float64, generator=generator)
        return x0, torch.randn(x0.shape, dtype=torch.float64, generator=generator)

    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
        x0, eps = batch(200)
        loss = objective.loss(model, x0, t, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # The best affine estimate of target = p x0 + q eps from x_t leaves var(target) - cov(target, x_t)^2 / var(x_t).
    one, zero = torch.ones(len(t), 1, 1, 1, dtype=torch.float64), torch.zeros(len(t), 1, 1, 1, dtype=torch.float64)
    p, q = (objective.target(x0, t, eps).flatten() for x0, eps in ((one, zero), (zero, one)))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    covariance = p * alpha * std**2 + q * sigma
    best = p**2 * std**2 + q**2 - covariance**2 / (alpha**2 * std**2 + sigma**2)
    x0, eps = batch(40_000)
    with torch.no_grad():
        reached = objective.loss(model, x0, t, eps)
    assert reached.mean() < 1.05 * best.mean()
    assert reached.mean() > 0.95 * best.mean()


def test_loss_is_a_mean_over_elements_with_conditions_passed_on():
    objective = OBJECTIVES["eps"](SCHEDULES["ddpm-linear"](T=1000))
    x0, eps = draw(2)
    seen = {}

    def off_by(x, c_noise, label):
        seen["label"] = label
        return eps + label[:, None, None, None]

    loss = objective.loss(off_by, x0, torch.tensor([1, 1000]), eps, label=torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(loss, torch.tensor([4.0, 9.0], dtype=torch.float64))
    assert "label" in seen


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_loss_is_float32_for_a_bf16_prediction(kind):
    objective = OBJECTIVES[kind](SCHEDULES["ddpm-linear"](T=1000))
    x0, eps = (x.float() for x in draw(2))
    loss = objective.loss(lambda x, c: x.bfloat16(), x0, torch.tensor([1, 1000]), eps)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(("kind", "name"), sorted(UNDEFINED))
def test_what_cannot_be_told_from_pure_noise_is_refused(kind, name):
    assert {"eps", "score"} <= set(NEED_SIGNAL)
    with pytest.raises(UserError, match=f"objective {kind} is not defined where alpha = 0"):
        build(kind, name)


def test_unknown_names_are_named():
    with pytest.raises(UserError, match="weighting 'loud' is unknown; choose one of uniform"):
        OBJECTIVES["eps"](make_schedule("ddpm-linear"), weighting="loud")
    with pytest.raises(UserError, match="objective 'noise' is unknown; choose one of eps"):
        make_objective("noise", schedule="cosine")
    with pytest.raises(UserError, match="schedule 'linear' is unknown"):
        make_objective("eps", schedule="linear")
    with pytest.raises(UserError, match="time sampling 'often' is unknown; choose one of auto, uniform"):
        build("eps", "cosine", time_sampling="often")
    with pytest.raises(UserError, match="logit-normal needs a time in"):
        build("edm", "edm", time_sampling="logit-normal")


def test_options_reach_their_formulas():
    t = torch.tensor([1], dtype=torch.int64)
    assert build("x0", "cosine", weighting="min-snr", min_snr_gamma=3.0).weight(t).item() == pytest.approx(3)
    assert build("x0", "cosine", weighting="edm", sigma_data=0.1).weight(t).item() == pytest.approx(
        math.exp(build("x0", "cosine").schedule.log_snr(t).item()) + 100, rel=1e-5
    )

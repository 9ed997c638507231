import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.diffusion.schedules import CONTINUOUS, DISCRETE, SCHEDULES, DiscreteSchedule, make_schedule, unnoised_end
from fastdiff.errors import UserError

ZERO = [f"{name}-zero" for name in DISCRETE]
NAMES = [*sorted(SCHEDULES), *ZERO]


def build(name, timesteps=1000):
    """A schedule by its name; `-zero` stands for --zero-terminal-snr."""
    return make_schedule(name.removesuffix("-zero"), timesteps=timesteps, zero_terminal_snr=name in ZERO)


def times(schedule, n=2001):
    """n times (float64) from t_min to t_max, where the noise changes evenly."""
    fraction = torch.linspace(0, 1, n, dtype=torch.float64)
    if schedule.prior_std == 1:
        return schedule.t_min + (schedule.t_max - schedule.t_min) * fraction
    return schedule.time_at(fraction)


@pytest.mark.parametrize("name", NAMES)
def test_signal_noise_and_log_snr_are_consistent(name):
    schedule = build(name)
    t = times(schedule)
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    torch.testing.assert_close(log_snr, torch.log(alpha**2 / sigma**2), rtol=1e-13, atol=1e-13)
    assert (log_snr.diff() < 0).all()
    zero = torch.zeros(1, dtype=torch.float64)
    assert (schedule.alpha(zero), schedule.sigma(zero), schedule.log_snr(zero)) == (1, 0, math.inf)
    if isinstance(schedule, DiscreteSchedule) or name == "vp-sde":
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-15)
    if name in (*ZERO, "flow"):
        assert (alpha[-1], sigma[-1], log_snr[-1]) == (0, 1, -math.inf)


@given(st.sampled_from(NAMES), st.floats(0, 1), st.integers(1, 300))
def test_the_time_of_a_log_snr_is_the_inverse(name, fraction, timesteps):
    schedule = build(name, timesteps)
    t = schedule.t_min + fraction * (schedule.t_max - schedule.t_min)
    t = torch.tensor(t, dtype=torch.float64)
    torch.testing.assert_close(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_time_of_a_log_snr_beyond_the_ends_is_the_end(name):
    schedule = build(name)
    log_snr = torch.tensor([math.inf, 1e4, -1e4, -math.inf], dtype=torch.float64)
    first, second, third, last = schedule.t_of_log_snr(log_snr).tolist()
    assert first == 0
    assert 0 <= second < schedule.t_min
    assert (third, last) == pytest.approx((schedule.t_max, schedule.t_max), rel=1e-12)


@given(st.sampled_from(NAMES), st.floats(0.001, 0.999), st.integers(2, 300))
def test_derivatives_are_those_of_alpha_and_sigma(name, fraction, timesteps):
    schedule = build(name, timesteps)
    t = schedule.t_min + fraction * (schedule.t_max - schedule.t_min)
    if isinstance(schedule, DiscreteSchedule):
        t = math.floor(t) + 0.5  # between whole times, where there are kinks
    t = torch.tensor(t, dtype=torch.float64)
    h = 1e-3 * min(t, schedule.t_max - t)  # a smaller one is dominated by rounding, where alpha or sigma is flat

    def slope(f):  # of fourth order in h
        return (8 * (f(t + h) - f(t - h)) - (f(t + 2 * h) - f(t - 2 * h))) / (12 * h)

    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    d_alpha, d_sigma, d_log_snr = (slope(f) for f in (schedule.alpha, schedule.sigma, schedule.log_snr))
    close = {"rtol": 1e-8, "atol": 1e-10 / schedule.t_max}
    torch.testing.assert_close(schedule.d_alpha(t), d_alpha, **close)
    torch.testing.assert_close(schedule.d_sigma(t), d_sigma, **close)
    torch.testing.assert_close(schedule.drift(t), d_alpha / alpha, **close)
    # Kingma et al. 2021: g^2 = -sigma^2 d log-SNR / dt.
    torch.testing.assert_close(schedule.diffusion_squared(t), -(sigma**2) * d_log_snr, **close)


def test_at_whole_times_the_derivative_is_that_of_the_interval_below():
    for name in (*DISCRETE, *ZERO):
        schedule = build(name, 20)
        t = torch.arange(1, 21, dtype=torch.float64)
        torch.testing.assert_close(
            schedule.d_alpha(t), (schedule.alpha(t) - schedule.alpha(t - 1e-6)) / 1e-6, rtol=1e-4, atol=1e-6
        )


def test_the_sdes_are_the_paper_s():
    """Song et al. 2021, eq. 29, and the coefficients of eq. 9, 11 and 14."""
    t = torch.linspace(1e-5, 1, 100, dtype=torch.float64)
    vp, subvp, ve = (build(name) for name in ("vp-sde", "subvp-sde", "ve-sde"))
    beta = 0.1 + t * 19.9
    mean = torch.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1)
    torch.testing.assert_close(vp.alpha(t), mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(subvp.alpha(t), mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(vp.sigma(t) ** 2, 1 - mean**2, rtol=1e-9, atol=0)
    torch.testing.assert_close(subvp.sigma(t) ** 2, (1 - mean**2) ** 2, rtol=1e-9, atol=0)
    for schedule in (vp, subvp):
        torch.testing.assert_close(schedule.drift(t), -0.5 * beta, rtol=1e-12, atol=0)
    torch.testing.assert_close(vp.diffusion_squared(t), beta, rtol=1e-12, atol=0)
    torch.testing.assert_close(subvp.diffusion_squared(t), beta * (1 - mean**4), rtol=1e-9, atol=0)
    # With sigma for the time, d sigma^2 / d sigma.
    sigma = times(ve, 100)
    torch.testing.assert_close(ve.sigma(sigma), 0.01 * 5000 ** torch.linspace(0, 1, 100, dtype=torch.float64))
    torch.testing.assert_close(ve.diffusion_squared(sigma), 2 * sigma)
    assert (ve.prior_std, build("edm").prior_std, vp.prior_std, subvp.prior_std) == (50, 80, 1, 1)


def test_discrete_linear_betas_go_over_into_the_vp_sde():
    """Song et al. 2021, appendix C: at 1000 steps the kernels agree "nearly exactly"; the gap falls as 1 / T."""
    vp, gaps = build("vp-sde"), []
    for T in (1000, 2000, 4000):
        discrete = SCHEDULES["ddpm-linear"](T, beta_start=0.1 / T, beta_end=20 / T)
        t = torch.arange(1, T + 1, dtype=torch.float64)
        gaps.append((discrete.alpha(t) - vp.alpha(t / T)).abs().max().item())
    assert gaps[0] < 0.004
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.02)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_float32_keeps_both_ends(name):
    schedule = build(name)
    # Times near the ends, exactly representable in float32.
    t = times(schedule, 100).float()
    t = torch.cat([t, schedule.t_min + (schedule.t_max - schedule.t_min) * torch.tensor([2.0**-20, 1 - 2.0**-20])])
    for method in (schedule.alpha, schedule.sigma, schedule.log_snr, schedule.c_noise, schedule.c_in):
        assert method(t).dtype == torch.float32
        assert method(t.double()).dtype == torch.float64
        torch.testing.assert_close(method(t).double(), method(t.double()), rtol=1e-7, atol=0)
    if isinstance(schedule, DiscreteSchedule):
        whole = torch.arange(1001)
        assert torch.equal(schedule.alpha(whole), schedule.alpha(whole.float()))


@pytest.mark.parametrize("name", NAMES)
def test_the_network_s_numbers_are_in_the_range_of_its_embedding(name):
    schedule = build(name)
    c_noise = schedule.c_noise(times(schedule))
    assert (c_noise.diff() > 0).all()
    assert c_noise[0] == pytest.approx(0, abs=1.001)
    assert c_noise[-1] == pytest.approx(1000, abs=1.001)


def test_linear_betas_are_ddpms():
    schedule = SCHEDULES["ddpm-linear"](T=1000)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(
        schedule.alpha(torch.arange(1, 1001, dtype=torch.float64)) ** 2, abar, rtol=1e-12, atol=0
    )


def test_cosine_follows_its_formula_until_the_clip():
    T = 1000
    t = torch.arange(T, dtype=torch.float64)
    f = torch.cos((t / T + 0.008) / 1.008 * torch.pi / 2) ** 2
    torch.testing.assert_close(SCHEDULES["cosine"](T=T).alpha(t) ** 2, f / f[0], rtol=1e-9, atol=1e-12)
    assert SCHEDULES["cosine"](T=T).alpha(torch.tensor([T])) > 0


@pytest.mark.parametrize("name", DISCRETE)
def test_rescaling_keeps_the_first_level_and_the_shape(name):
    """Lin et al. 2024, algorithm 1: alpha is shifted to end in 0 and scaled to begin as before."""
    t = torch.arange(1, 1001, dtype=torch.float64)
    plain, zero = (build(n).alpha(t) for n in (name, f"{name}-zero"))
    torch.testing.assert_close(zero, (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1]), rtol=1e-9, atol=1e-13)
    assert zero[-1] == 0
    assert make_schedule(name, timesteps=1, zero_terminal_snr=True).alpha(torch.ones(1)) == 0


def test_rescaled_betas_equal_diffusers():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    schedule = build("ddpm-linear-zero")
    torch.testing.assert_close(
        schedule.alpha(torch.arange(1, 1001, dtype=torch.float64)) ** 2, abar, rtol=1e-9, atol=1e-15
    )


@given(st.sampled_from(NAMES), st.integers(1, 200), st.data())
def test_grids_descend_from_noise_to_zero(name, T, data):
    schedule = build(name, T)
    n = data.draw(st.integers(1, T))
    for spacing in ("auto", "trailing", "leading", "uniform", "karras", "log-snr"):
        if spacing == "leading" and name in CONTINUOUS:
            continue
        if spacing in ("karras", "log-snr") and name in ("flow", *ZERO):
            with pytest.raises(UserError, match=f"spacing {spacing} needs some signal"):
                schedule.grid(n, spacing=spacing)
            continue
        if schedule.t_max == schedule.t_min and n > 1:  # T = 1 has one level
            continue
        ts = schedule.grid(n, spacing=spacing)
        assert ts.shape == (n + 1,)
        assert ts.dtype == torch.float64
        assert (ts.diff() < 0).all()
        assert ts[-1] == 0
        if spacing != "leading":
            assert ts[0] == schedule.t_max
        if spacing in ("uniform", "karras", "log-snr") and n > 1:
            assert ts[-2] == schedule.t_min
        if name not in CONTINUOUS and spacing in ("trailing", "leading"):
            assert torch.equal(ts, ts.round())


def test_grids_are_even_in_what_they_are_named_after():
    schedule = build("edm")
    # Karras et al. 2022, eq. 5, with its numbers.
    i = torch.arange(18, dtype=torch.float64)
    karras = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(schedule.grid(18)[:-1], karras, rtol=1e-12, atol=0)
    vp = build("vp-sde")
    steps = vp.log_snr(vp.grid(10, spacing="log-snr")[:-1]).diff()
    torch.testing.assert_close(steps, steps[:1].expand(9), rtol=1e-9, atol=0)
    assert vp.grid(4, spacing="uniform").tolist() == pytest.approx([1, 0.66667, 0.33334, 1e-5, 0])
    assert build("flow").grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]


@given(st.integers(1, 1000), st.data())
def test_leading_strides_are_even_and_reach_to_the_end(T, data):
    n = data.draw(st.integers(1, T))
    ts = build("cosine", T).grid(n, spacing="leading")
    assert (ts[-2], ts[-1]) == (1, 0)
    strides = {int(stride) for stride in -ts[:-1].diff()}
    assert strides <= {T // n, -(-T // n)}
    assert T - ts[0] < T / n


def test_a_schedule_that_does_not_end_in_noise_says_so():
    assert [name for name in NAMES if unnoised_end(build(name))] == []
    said = unnoised_end(build("ddpm-linear", 100))
    assert "ddpm-linear with T = 100 does not end in noise: x_T keeps 0.6 of the image (SNR 0.57)" in said
    assert "--zero-terminal-snr" in said
    assert unnoised_end(build("ddpm-linear-zero", 100)) is None
    assert unnoised_end(build("cosine", 100)) is None


def test_bad_arguments_are_named():
    schedule = build("ddpm-linear", 10)
    for n in (0, -1):
        with pytest.raises(UserError, match=f"{n} sampling steps"):
            schedule.grid(n)
        with pytest.raises(UserError, match=f"{n} sampling steps"):
            build("flow").grid(n)
    with pytest.raises(UserError, match="11 sampling steps"):
        schedule.grid(11)
    with pytest.raises(UserError, match="spacing 'quadratic' is unknown"):
        schedule.grid(2, spacing="quadratic")
    with pytest.raises(UserError, match="leading is for discrete"):
        build("edm").grid(2, spacing="leading")
    for name in (*DISCRETE, *ZERO):
        with pytest.raises(UserError, match="T is 0"):
            build(name, 0)
    with pytest.raises(ValueError, match="betas"):
        DiscreteSchedule(torch.tensor([0.0, 0.1], dtype=torch.float64))
    with pytest.raises(ValueError, match="betas"):
        DiscreteSchedule(torch.tensor([1.0, 0.1], dtype=torch.float64))
    with pytest.raises(UserError, match="schedule 'linear' is unknown"):
        make_schedule("linear")
    with pytest.raises(UserError, match="--zero-terminal-snr rescales"):
        make_schedule("edm", zero_terminal_snr=True)

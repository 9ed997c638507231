import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.diffusion.schedules import SCHEDULES, DiscreteSchedule
from fastdiff.errors import UserError

NAMES = sorted(SCHEDULES)


@pytest.mark.parametrize("name", NAMES)
def test_signal_and_noise_are_consistent(name):
    schedule = SCHEDULES[name](T=1000)
    t = torch.arange(1, 1001, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-15)
    torch.testing.assert_close(schedule.log_snr(t), torch.log(alpha**2 / sigma**2), rtol=1e-9, atol=1e-9)
    assert (schedule.log_snr(t).diff() < 0).all()
    assert schedule.alpha(torch.zeros(1)) == 1
    assert schedule.sigma(torch.zeros(1)) == 0


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


@pytest.mark.parametrize("name", NAMES)
def test_dtype_follows_t_and_integers_equal_whole_floats(name):
    schedule = SCHEDULES[name](T=50)
    whole = torch.arange(51)
    for method in (schedule.alpha, schedule.sigma, schedule.c_noise):
        assert method(whole).dtype == method(whole.float()).dtype == torch.float32
        assert method(whole.double()).dtype == torch.float64
        assert torch.equal(method(whole), method(whole.float()))
    assert (schedule.alpha(torch.arange(0, 50, 0.5)).diff() < 0).all()


@given(st.sampled_from(NAMES), st.integers(1, 200), st.data())
def test_grids_descend_from_noise_to_zero(name, T, data):
    schedule = SCHEDULES[name](T=T)
    n = data.draw(st.integers(1, T))
    for spacing in ("trailing", "leading"):
        ts = schedule.grid(n, spacing=spacing)
        assert ts.shape == (n + 1,)
        assert ts.dtype == torch.float64
        assert (ts.diff() < 0).all()
        assert torch.equal(ts, ts.round())
        assert ts[-1] == 0
    assert schedule.grid(n)[0] == T


def test_times_are_uniform_and_follow_the_generator():
    schedule = SCHEDULES["ddpm-linear"](T=10)
    t = schedule.sample_t(100_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(t, minlength=11)
    assert counts[0] == 0
    assert (counts[1:] - 10_000).abs().max() < 4 * (100_000 * 0.1 * 0.9) ** 0.5
    assert torch.equal(t, schedule.sample_t(100_000, generator=torch.Generator().manual_seed(0)))


def test_bad_arguments_are_named():
    schedule = SCHEDULES["ddpm-linear"](T=10)
    for n in (0, -1, 11):
        with pytest.raises(UserError, match=f"{n} sampling steps"):
            schedule.grid(n)
    with pytest.raises(UserError, match="spacing 'quadratic' is unknown"):
        schedule.grid(2, spacing="quadratic")
    for name in NAMES:
        with pytest.raises(UserError, match="T is 0"):
            SCHEDULES[name](T=0)
    with pytest.raises(ValueError, match="betas"):
        DiscreteSchedule(torch.tensor([0.0, 0.1], dtype=torch.float64))

import math

import pytest
import torch
from torchdiffeq import odeint

from fastdiff.diffusion.likelihood import bits_per_dim, dequantize, likelihood_grid, log_likelihood
from fastdiff.errors import UserError
from tests.diffusion.truths import (
    ALL,
    gaussian_denoise,
    gaussian_flow,
    gaussian_marginal,
    log_snr_grid,
    mixture_denoise,
    mixture_log_terms,
    time,
)


def normal_log_density(x, mean, std):
    return (-0.5 * ((x - mean) / std) ** 2 - math.log(math.sqrt(2 * math.pi)) - torch.log(std)).flatten(1).sum(1)


def images(n=2):
    return torch.linspace(-1, 1, 12 * n, dtype=torch.float64).reshape(n, 3, 2, 2)


@pytest.mark.parametrize("schedule", sorted(ALL))
def test_gaussian_data_against_the_closed_form(schedule):
    schedule, x = ALL[schedule], images()
    ts = likelihood_grid(schedule, 150)
    log_p, x_T = log_likelihood(gaussian_denoise(schedule), schedule, x, ts)
    # The latent and the Jacobian of the exact flow, under the prior that the sampler starts from.
    z = gaussian_flow(schedule, x, ts[-1], ts[0])
    (_, std_T), (_, std_0) = gaussian_marginal(schedule, ts[0]), gaussian_marginal(schedule, ts[-1])
    expected = normal_log_density(z, 0.0, time(schedule.prior_std)) + 12 * torch.log(std_T / std_0)
    torch.testing.assert_close(x_T, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_p, expected, rtol=0, atol=2e-4)
    # And so it is the density of the data: the prior is that of x_T up to the signal left at t_max.
    mean, std = gaussian_marginal(schedule, ts[-1])
    truth = normal_log_density(x, mean, std)
    bits, true_bits = bits_per_dim(log_p, 12), bits_per_dim(truth, 12)
    assert float((bits - true_bits).abs().max()) < 0.02


def test_two_modes_against_their_density():
    schedule, x = ALL["vp-sde"], torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(40, 1, 1, 1)
    ts = likelihood_grid(schedule, 400)
    log_p, _ = log_likelihood(mixture_denoise(schedule), schedule, x, ts)
    truth = mixture_log_terms(schedule, x, ts[-1])[0].logsumexp(0).flatten()
    assert float((log_p - truth).abs().max()) < 0.02
    assert float(truth.max() - truth.min()) > 10  # from the modes to far between them


@pytest.mark.parametrize("schedule", ["vp-sde", "ve-sde", "flow"])
def test_the_likelihood_by_torchdiffeq(schedule):
    """State and log-density integrated together (FFJORD, Grathwohl et al. 2019, eq. 4) by an adaptive solver."""
    schedule = ALL[schedule]
    exact, x = mixture_denoise(schedule), torch.linspace(-1, 1, 9, dtype=torch.float64)
    ts = log_snr_grid(schedule, -6.0, 4.0, 200)

    def slope(rho, state):
        """dy / d rho = (y - x0_hat) / rho for y = x / alpha, rho = sigma / alpha; d log p / d rho = -divergence."""
        y = state[0].detach().requires_grad_()
        t = schedule.t_of_log_snr(-2 * rho.log())
        with torch.enable_grad():
            dy = (y - exact(schedule.alpha(t) * y, t)) / rho
            (divergence,) = torch.autograd.grad(dy.sum(), y)  # each element is an image of its own
        return dy.detach(), -divergence

    alpha, rho = schedule.alpha(ts[[-1, 0]]), (schedule.sigma(ts) / schedule.alpha(ts))[[-1, 0]]
    y, change = (v[-1] for v in odeint(slope, (x / alpha[0], torch.zeros_like(x)), rho, rtol=1e-9, atol=1e-9))
    x_T = alpha[1] * y
    # log p(x) = log p(x_T) + log |d x_T / d x|, and the solver's change is that of y.
    prior = normal_log_density(x_T[:, None], 0.0, time(schedule.prior_std))
    expected = prior - change + torch.log(alpha[1] / alpha[0])
    log_p, end = log_likelihood(exact, schedule, x.reshape(-1, 1, 1, 1), ts)
    torch.testing.assert_close(end.flatten(), x_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_p, expected, rtol=0, atol=1e-3)


def test_the_method_is_of_fourth_order():
    schedule, x = ALL["vp-sde"], images()
    errors = []
    for n in (40, 80):
        ts = torch.linspace(1.0, 0.05, n + 1, dtype=torch.float64)
        errors.append(
            (log_likelihood(gaussian_denoise(schedule), schedule, x, ts)[1] - gaussian_flow(schedule, x, ts[-1], ts[0]))
            .abs()
            .max()
        )
    assert abs(math.log2(errors[0] / errors[1]) - 4) < 0.3


def test_hutchinson_s_estimate_is_unbiased_and_its_error_falls_with_the_probes():
    """A denoiser that mixes pixels: one probe is off, the mean of many is the exact trace."""
    schedule, ts = ALL["vp-sde"], torch.linspace(1.0, 0.2, 13, dtype=torch.float64)
    mix = 0.1 * torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def denoise(x, t):
        return schedule.alpha(t) * (x.flatten(1) @ mix.T).reshape(x.shape)

    def estimate(probes, n, seed):
        x, generator = images(1).expand(n, -1, -1, -1).contiguous(), torch.Generator().manual_seed(seed)
        return log_likelihood(denoise, schedule, x, ts, probes=probes, generator=generator)

    (one, x_T), (many, _) = estimate(1, 4000, 0), estimate(16, 1000, 1)
    assert abs(one.std() / many.std() / 4 - 1) < 0.15
    # The integral over theta of the exact divergence, (d cos - tr(J)) / sin, J = cos M as alpha = cos and k = 1.
    theta = torch.linspace(*torch.atan2(schedule.sigma(ts), schedule.alpha(ts))[[-1, 0]].tolist(), 20_001).double()
    integral = torch.trapezoid((12 - mix.trace()) * theta.cos() / theta.sin(), theta)
    expected = normal_log_density(x_T[:1], 0.0, time(1.0)) + integral
    assert abs(one.mean() - expected) < 4 * one.std() / 4000**0.5
    assert abs(many.mean() - expected) < 4 * many.std() / 1000**0.5


def test_bits_of_uniform_noise_are_the_bits_of_its_levels():
    levels = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = dequantize(levels, generator=torch.Generator().manual_seed(0))
    assert torch.equal(((x + 1) * 127.5).round().clamp(0, 255).byte(), levels)
    # Uniform over 256 levels, of width 1 / 127.5 each: 8 bits.
    log_p = torch.full((3,), -48 * math.log(256 / 127.5))
    torch.testing.assert_close(bits_per_dim(log_p, 48), torch.full((3,), 8.0))


def test_bad_requests_are_named():
    schedule = ALL["vp-sde"]
    with pytest.raises(UserError, match="ends above t = 0"):
        log_likelihood(gaussian_denoise(schedule), schedule, images(), schedule.grid(3))
    with pytest.raises(UserError, match="probes is 0"):
        log_likelihood(gaussian_denoise(schedule), schedule, images(), schedule.grid(3)[:-1], probes=0)


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_grid_goes_from_one_end_to_the_other(name):
    ts = likelihood_grid(ALL[name], 40)
    assert (len(ts), float(ts[0]), float(ts[-1])) == (41, ALL[name].t_max, ALL[name].t_min)
    assert (ts.diff() < 0).all()

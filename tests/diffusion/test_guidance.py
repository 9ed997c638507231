"""Guidance between two Gaussians, whose guided trajectories are known exactly, and between two mixtures."""

import math

import pytest
import torch

from fastdiff.diffusion.guidance import guide, guided
from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.diffusion.schedules import make_schedule
from fastdiff.errors import UserError

VE = make_schedule("edm")
S_C, S_U = 0.4, 0.9  # standard deviations of the class and of all data


def gaussian(mean, std, schedule=VE):
    """E[x0 | x_t] for x0 ~ N(mean, std^2)."""

    def denoise(x, t, *r):
        a, s = schedule.alpha(t), schedule.sigma(t)
        return mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)

    return denoise


def drawn(denoise, schedule=VE, *, steps=400, noise=(1.0,)):
    """What the probability flow makes of standardised noise."""
    x_T = schedule.prior_std * torch.tensor(noise, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return SAMPLERS["heun"](denoise, schedule, x_T, schedule.grid(steps)).flatten()


@pytest.mark.parametrize("w", [0.0, 1.0, 1.5, 3.0])
def test_of_equal_means_the_standard_deviations_geometric_mean_is_drawn(w):
    denoise = guided(gaussian(0.3, S_C), gaussian(0.3, S_U), VE, scale=w)
    low, high = drawn(denoise, noise=(-1.0, 1.0))
    expected, top = S_C**w * S_U ** (1 - w), VE.prior_std
    assert (high - low) / 2 == pytest.approx(expected, rel=3e-3)
    assert (high + low) / 2 == pytest.approx(0.3 - 0.3 * expected / top, abs=1e-4)  # the noise is of mean 0, not 0.3
    if w > 1:  # and not that of the density p_c^w p_u^(1-w)
        tilted = (w / S_C**2 + (1 - w) / S_U**2) ** -0.5
        assert tilted > 1.2 * expected


@pytest.mark.parametrize("w", [1.0, 2.0, 4.0])
def test_of_equal_standard_deviations_the_mean_moves_by_w(w):
    denoise = guided(gaussian(0.5, S_C), gaussian(-0.1, S_C), VE, scale=w)
    low, high = drawn(denoise, noise=(-1.0, 1.0))
    mean = -0.1 + w * 0.6
    assert (high + low) / 2 == pytest.approx(mean - mean * S_C / VE.prior_std, abs=1e-4)
    assert (high - low) / 2 == pytest.approx(S_C, rel=3e-3)


@pytest.mark.parametrize("w", [1.5, 3.0])
def test_an_interval_guides_only_within_it(w):
    lo, hi, top = 0.2, 1.5, VE.prior_std
    denoise = guided(gaussian(0.0, S_C), gaussian(0.0, S_U), VE, scale=w, interval=(lo, hi))
    inside = (S_C**2 + lo**2) * (S_U**2 + hi**2) / ((S_C**2 + hi**2) * (S_U**2 + lo**2))
    expected = top * S_C / math.hypot(S_C, top) * inside ** ((w - 1) / 2)
    assert drawn(denoise, steps=2000).item() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", ["edm", "vp-sde", "cosine", "flow"])
def test_a_guided_mixture_is_the_mixture_of_its_quadrature_on_every_schedule(name):
    """The estimates of a class and of all three, against sums over a fine grid of x0."""
    schedule = make_schedule(name)
    means, width, grid = (
        torch.tensor([-0.8, 0.1, 0.7], dtype=torch.float64),
        0.15,
        torch.linspace(-3, 3, 20001, dtype=torch.float64),
    )
    t = schedule.grid(20)[12]
    a, s = schedule.alpha(t), schedule.sigma(t)

    def of(centres):
        prior = torch.exp(-((grid[:, None] - centres) ** 2) / (2 * width**2)).sum(1)
        return lambda x: ((w := prior * torch.exp(-((x - a * grid) ** 2) / (2 * s**2))) * grid).sum() / w.sum()

    def denoise(centres):
        def estimate(x, t):
            a, s = schedule.alpha(t), schedule.sigma(t)
            variance = a**2 * width**2 + s**2
            share = torch.softmax(-((x - a * centres) ** 2) / (2 * variance), -1)
            return (share * (centres + a * width**2 / variance * (x - a * centres))).sum(-1, keepdim=True)

        return estimate

    x = torch.tensor([[[[0.4]]]], dtype=torch.float64)
    value = guided(denoise(means[1:2]), denoise(means), schedule, scale=2.5)(x, t)
    asked, rest = of(means[1:2])(x.item()), of(means)(x.item())
    assert value.item() == pytest.approx((rest + 2.5 * (asked - rest)).item(), abs=1e-9)


def test_w_of_1_is_exactly_the_asked_estimate_and_a_network_that_guides_itself_changes_nothing():
    asked, other = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    w = torch.tensor([1.0, 0.0, 1.5, 1.0, 3.0])
    led = guide(asked, other, w)
    assert torch.equal(led[[0, 3]], asked[[0, 3]])
    assert torch.equal(led[1], other[1])
    assert not torch.equal(led[2], asked[2])
    for scale in (-1.0, 0.0, 1.0, 7.5):
        assert torch.equal(guide(asked, asked, torch.tensor([scale])), asked)


@pytest.mark.parametrize(
    ("scale", "interval", "message"),
    [(math.nan, None, "--guidance is nan"), (2.0, (1.5, 0.2), "--guidance-interval is '1.5 0.2'"),
     (2.0, (-0.1, 0.2), "0 <= LO < HI"), (2.0, (math.nan, 0.2), "0 <= LO < HI")],
)  # fmt: skip
def test_what_cannot_be_is_refused(scale, interval, message):
    with pytest.raises(UserError, match=message):
        guided(gaussian(0, 1), gaussian(0, 1), VE, scale=scale, interval=interval)

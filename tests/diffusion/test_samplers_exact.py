"""Samplers on data whose trajectories and distributions are known exactly."""

import math

import pytest
import torch

from fastdiff.diffusion.samplers import SAMPLERS
from tests.diffusion.truths import (
    ALL,
    MEAN,
    MODES,
    STD,
    WEIGHTS,
    WIDTH,
    gaussian_denoise,
    gaussian_flow,
    gaussian_marginal,
    log_snr_grid,
    mixture_denoise,
    time,
)

# UniPC-p is of order p + 1 (Zhao et al. 2023, theorem 3.1): the corrector adds one to the predictor's p.
ORDERS = [
    ("ddim", {}, 1), ("flow-map", {}, 1), ("euler", {}, 1), ("heun", {}, 2), ("dpmpp-2m", {}, 2), ("dpmpp-3m", {}, 3),
    ("unipc", {"order": 1}, 2), ("unipc", {"order": 2}, 3), ("unipc", {"order": 3}, 4),
]  # fmt: skip


def worst_error(name, schedule, grids, **options):
    """Largest error at the ends of the grids, against the exact flow from their start."""
    x_T = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, 1, 2, 4)
    errors = []
    for ts in grids:
        x = SAMPLERS[name](gaussian_denoise(schedule), schedule, x_T, ts, **options)
        errors.append(float((x - gaussian_flow(schedule, x_T, ts[0], ts[-1])).abs().max()))
    return max(errors)


@pytest.mark.parametrize("schedule", sorted(ALL))
@pytest.mark.parametrize(("name", "options", "order"), ORDERS)
def test_order_of_convergence_to_the_exact_trajectory(name, options, order, schedule):
    # Several ends, as the error may pass through 0 at one of them.
    schedule, ends = ALL[schedule], (1.0, 3.0, 5.0)
    e = [worst_error(name, schedule, [log_snr_grid(schedule, -6.0, end, n) for end in ends], **options)
         for n in (80, 160)]  # fmt: skip
    assert abs(math.log2(e[0] / e[1]) - order) < 0.3


@pytest.mark.parametrize(("name", "options", "order"), [row for row in ORDERS if row[2] < 3])
def test_order_of_convergence_from_no_signal_at_all(name, options, order):
    schedule, ends = ALL["flow"], (0.2, 0.4, 0.6)
    e = [worst_error(name, schedule, [torch.linspace(1.0, end, n + 1, dtype=torch.float64) for end in ends], **options)
         for n in (160, 320)]  # fmt: skip
    assert abs(math.log2(e[0] / e[1]) - order) < 0.3


SDE = [
    ("ddpm", {}), ("ddpm", {"variance": "fixed-large"}), ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.5}),
    ("euler-ancestral", {}), ("euler-maruyama", {}), ("dpmpp-2m-sde", {}),
    ("euler", {"S_churn": 10.0}), ("heun", {"S_churn": 10.0}),
]  # fmt: skip
CHAINS = 100_000


def seeded(seed):
    return torch.Generator().manual_seed(seed)


MEAN_ERROR, STD_ERROR = STD / CHAINS**0.5, STD / (2 * CHAINS) ** 0.5


def grid_to_clean(schedule, n):
    """n + 1 steps, evenly in log-SNR and at last to t = 0."""
    return torch.cat([log_snr_grid(schedule, -8.0, 10.0, n), time([0.0])])


def exact_moments(name, schedule, ts, monkeypatch, **options):
    """Mean and standard deviation of the sampler's own discretisation: x_0 is affine in x_T and in every draw.

    Chain i of a batch gets a unit draw at the i-th drawing and none at any other; the last two get none at all.
    """
    draws, size = [], len(ts)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda shape, **_: unit(len(draws), shape, draws))
        x_T = torch.zeros(size + 2, 1, 1, 1, dtype=torch.float64)
        x_T[-1] = 1.0
        x = SAMPLERS[name](gaussian_denoise(schedule), schedule, x_T, ts, **options).flatten()
    assert 0 < len(draws) <= size
    mean_T, std_T = gaussian_marginal(schedule, ts[0])
    base, slope = x[-2], x[-1] - x[-2]
    return base + slope * mean_T, ((slope * std_T) ** 2 + ((x[:size] - base) ** 2).sum()).sqrt()


def unit(i, shape, draws):
    draws.append(i)
    z = torch.zeros(shape, dtype=torch.float64)
    z[i] = 1.0
    return z


@pytest.mark.parametrize("schedule", ["ddpm-linear", "edm", "flow"])
@pytest.mark.parametrize(("name", "options"), SDE)
def test_many_steps_give_the_data_s_mean_and_standard_deviation(name, options, schedule, monkeypatch):
    schedule = ALL[schedule]
    bias = []
    for n in (250, 1000):
        mean, std = exact_moments(name, schedule, grid_to_clean(schedule, n), monkeypatch, **options)
        bias.append((abs(mean - MEAN), abs(std - STD)))
    assert bias[1][0] < 4 * MEAN_ERROR
    assert bias[1][1] < 4 * STD_ERROR
    assert bias[1][1] < bias[0][1] / 2 + 1e-4  # of the last step, from a log-SNR of 10


@pytest.mark.parametrize("schedule", ["ddpm-linear", "edm", "flow"])
@pytest.mark.parametrize(("name", "options"), SDE)
def test_chains_have_the_moments_of_their_discretisation(name, options, schedule, monkeypatch):
    schedule = ALL[schedule]
    ts = grid_to_clean(schedule, 40)
    mean, std = exact_moments(name, schedule, ts, monkeypatch, **options)
    generator = torch.Generator().manual_seed(3)
    mean_T, std_T = gaussian_marginal(schedule, ts[0])
    x_T = mean_T + std_T * torch.randn(100, 1, 25, 40, dtype=torch.float64, generator=generator)
    x = SAMPLERS[name](gaussian_denoise(schedule), schedule, x_T, ts, generator=generator, **options)
    assert abs(x.mean() - mean) < 4 * MEAN_ERROR
    assert abs(x.std() - std) < 4 * STD_ERROR


@pytest.mark.parametrize("schedule", ["cosine", "ve-sde", "flow"])
def test_predictor_corrector_has_the_moments_of_its_discretisation(schedule):
    schedule, snr, m = ALL[schedule], 0.16, 2
    ts = grid_to_clean(schedule, 30)
    alpha, sigma = schedule.alpha(ts), schedule.sigma(ts)
    mean, std = start = gaussian_marginal(schedule, ts[0])
    variance = std**2
    for i in range(len(ts) - 2):
        # Reverse diffusion, with the score -(x - mean_t) / variance_t of the data's marginal.
        mean_t, std_t = gaussian_marginal(schedule, ts[i])
        a = alpha[i] / alpha[i + 1]
        g2 = sigma[i] ** 2 - (a * sigma[i + 1]) ** 2
        slope = 2.0 - a - g2 / std_t**2
        mean, variance = slope * mean + g2 / std_t**2 * mean_t, slope**2 * variance + g2
        # Langevin: |g|^2 / d is the mean square of the score over the chains.
        mean_s, std_s = gaussian_marginal(schedule, ts[i + 1])
        for _ in range(m):
            square = (variance + (mean - mean_s) ** 2) / std_s**4
            size = 2.0 * (alpha[i + 1] / alpha[i + 2]) ** 2 * snr**2 / square
            slope = 1.0 - size / std_s**2
            mean, variance = slope * mean + size / std_s**2 * mean_s, slope**2 * variance + 2.0 * size
    mean_t, std_t = gaussian_marginal(schedule, ts[-2])
    slope = alpha[-2] * STD**2 / std_t**2  # at last x0_hat
    mean, std = MEAN + slope * (mean - mean_t), slope * variance.sqrt()
    generator = torch.Generator().manual_seed(3)
    x_T = start[0] + start[1] * torch.randn(4, 1, 125, 200, dtype=torch.float64, generator=generator)
    x = SAMPLERS["predictor-corrector"](
        gaussian_denoise(schedule), schedule, x_T, ts, generator=generator, snr=snr, corrector_steps=m
    )
    assert abs(x.mean() - mean) < 4 * MEAN_ERROR
    assert abs(x.std() - std) < 4 * STD_ERROR
    assert abs(std - STD) < 0.05  # Langevin steps of this size are too wide by 1 / (1 - snr^2), 2.6%


@pytest.mark.lab
def test_predictor_corrector_with_small_langevin_steps_has_the_data_s_moments():
    schedule = ALL["vp-sde"]
    ts = schedule.grid(1000)
    mean, std = gaussian_marginal(schedule, ts[0])
    generator = torch.Generator().manual_seed(3)
    x_T = mean + std * torch.randn(4, 1, 125, 200, dtype=torch.float64, generator=generator)
    x = SAMPLERS["predictor-corrector"](
        gaussian_denoise(schedule), schedule, x_T, ts, generator=generator, snr=0.02
    )  # fmt: skip
    assert abs(x.mean() - MEAN) < 4 * MEAN_ERROR
    assert abs(x.std() - STD) < 4 * STD_ERROR


@pytest.mark.parametrize("schedule", sorted(ALL))
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_one_and_two_steps_do_not_leave_the_data(name, schedule):
    """Too narrow is what so few steps can be; they must not spread the noise."""
    schedule = ALL[schedule]
    for n in (1, 2):
        generator = torch.Generator().manual_seed(5)
        x_T = schedule.prior_std * torch.randn(2, 1, 50, 100, dtype=torch.float64, generator=generator)
        x = SAMPLERS[name](gaussian_denoise(schedule), schedule, x_T, schedule.grid(n), generator=generator)
        assert abs(x.mean() - MEAN) < 2 * STD
        assert x.std() < 2 * STD


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("schedule", ["cosine", "cosine-zero", "edm", "flow"])
def test_the_exact_flow_map_draws_the_data_in_any_number_of_steps(schedule, steps):
    schedule = ALL[schedule]
    ts = schedule.grid(steps, spacing="few-step", last_level=1.5)
    x_T = schedule.prior_std * torch.randn(100, 1, 25, 40, dtype=torch.float64, generator=seeded(3))

    def ends(x, t, r):
        """The x0_hat on the line through x_r."""
        keep = schedule.sigma(r) / schedule.sigma(t)
        return (gaussian_flow(schedule, x, t, r) - keep * x) / (schedule.alpha(r) - schedule.alpha(t) * keep)

    for name, options in (("consistency", {}), ("flow-map", {}), ("flow-map", {"gamma": 0.6})):
        x = SAMPLERS[name](ends, schedule, x_T, ts, generator=seeded(4), **options)
        # x_T lacks the little signal that is left at the noisiest time.
        left = float(schedule.alpha(ts[0]) / schedule.sigma(ts[0]))
        assert abs(x.mean() - MEAN) < 4 * MEAN_ERROR + left
        assert abs(x.std() - STD) < 4 * STD_ERROR + left


@pytest.mark.parametrize("schedule", ["cosine", "vp-sde", "edm", "flow"])
@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"consistency"}))  # which needs another network
def test_two_modes_get_their_weights_and_widths(name, schedule):
    schedule, n = ALL[schedule], 10_000
    generator = torch.Generator().manual_seed(4)
    ts = grid_to_clean(schedule, 100)
    x_T = schedule.sigma(ts[0]) * torch.randn(10, 1, 25, 40, dtype=torch.float64, generator=generator)
    x = SAMPLERS[name](mixture_denoise(schedule), schedule, x_T, ts, generator=generator)
    upper = x > sum(MODES) / 2
    # x_T lacks the little signal that is left at a log-SNR of -8, which moves the weights by less than 0.01.
    assert abs(upper.double().mean() - WEIGHTS[1]) < 0.01 + 4 * math.sqrt(WEIGHTS[0] * WEIGHTS[1] / n)
    for part, mode in ((~upper, MODES[0]), (upper, MODES[1])):
        assert abs(x[part].mean() - mode) < 0.02
        assert abs(x[part].std() / WIDTH - 1) < 0.15


def test_leading_times_lead_to_the_data_whatever_the_steps():
    schedule = ALL["ddpm-linear"]
    x_T = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for n in (500, 501, 999):
        ts = schedule.grid(n, spacing="leading")
        x = SAMPLERS["ddim"](gaussian_denoise(schedule, mean=-0.5), schedule, x_T, ts)
        assert float(x) == pytest.approx(-0.5, abs=0.01)

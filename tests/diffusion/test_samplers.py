import diffusers
import pytest
import torch

from fastdiff.diffusion.objectives import OBJECTIVES
from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.diffusion.schedules import SCHEDULES
from fastdiff.errors import UserError

LINEAR = SCHEDULES["ddpm-linear"](T=1000)
SHAPE = (2, 3, 4, 4)


def eps_network(x, index):
    """A smooth stand-in for a network, far from linear in x and in the noise level."""
    return torch.tanh(1.3 * x) + 0.2 * torch.cos(index.to(x.dtype).reshape(-1, 1, 1, 1) / 100)


def denoise(x, t):
    return OBJECTIVES["eps"](LINEAR).denoise(eps_network, x, t)


def noise(dtype=torch.float64):
    return torch.randn(SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(1))


def run_diffusers(scheduler, n, **options):
    # diffusers keeps its tables in float32; float64 ones make the comparison one of formulas.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    scheduler.one, scheduler.final_alpha_cumprod = (
        torch.ones((), dtype=torch.float64),
        torch.ones((), dtype=torch.float64),
    )
    scheduler.set_timesteps(n)
    generator, x = torch.Generator().manual_seed(7), noise()
    for index in scheduler.timesteps:
        x = scheduler.step(eps_network(x, index), index, x, generator=generator, **options).prev_sample
    return x


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_equals_diffusers_over_1000_steps(variance, clip):
    expected = run_diffusers(diffusers.DDPMScheduler(variance_type=variance, clip_sample=clip), 1000)
    x = SAMPLERS["ddpm"](
        denoise, LINEAR, noise(), LINEAR.grid(1000), variance=variance.replace("_", "-"), clip_x0=clip,
        generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [10, 50, 100])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_equals_diffusers(n, eta, spacing, clip):
    scheduler = diffusers.DDIMScheduler(clip_sample=clip, timestep_spacing=spacing)
    # With clipping, ours derives the noise from the clamped x0, which diffusers calls use_clipped_model_output.
    expected = run_diffusers(scheduler, n, eta=eta, use_clipped_model_output=clip)
    x = SAMPLERS["ddim"](
        denoise, LINEAR, noise(), LINEAR.grid(n, spacing=spacing), eta=eta, clip_x0=clip,
        generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def gaussian_denoise(schedule, mean, std):
    """E[x0 | x_t] for x0 ~ N(mean, std^2): exact."""

    def f(x, t):
        a, s = schedule.alpha(t), schedule.sigma(t)
        return mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)

    return f


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_ddim_converges_to_the_exact_trajectory_at_first_order(name):
    schedule, mean, std = SCHEDULES[name](T=100_000), 0.3, 0.5
    a, s = (f(torch.tensor([100_000.0], dtype=torch.float64)) for f in (schedule.alpha, schedule.sigma))
    x_T = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, 1, 2, 4)
    # The probability flow of a Gaussian keeps the standardised value (x - alpha mean) / sqrt(alpha^2 std^2 + sigma^2).
    exact = mean + std * (x_T - a * mean) / (a**2 * std**2 + s**2).sqrt()
    errors = []
    for n in (125, 250, 500, 1000):
        x = SAMPLERS["ddim"](gaussian_denoise(schedule, mean, std), schedule, x_T, schedule.grid(n))
        errors.append((x - exact).abs().max().log2())
    order = (errors[0] - errors[-1]) / 3
    assert abs(order - 1) < 0.3


@pytest.mark.parametrize(
    ("sampler", "options"),
    [("ddpm", {}), ("ddpm", {"variance": "fixed-large"}), ("ddim", {"eta": 1.0}), ("ddim", {})],
)
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_chains_have_the_data_s_mean_and_standard_deviation(name, sampler, options):
    schedule, mean, std, n = SCHEDULES[name](T=1000), 0.3, 0.5, 40_000
    generator = torch.Generator().manual_seed(3)
    a, s = (f(torch.tensor([1000.0], dtype=torch.float64)) for f in (schedule.alpha, schedule.sigma))
    # Start from the exact marginal at T, so that only the sampler's own error is left.
    x_T = a * mean + (a**2 * std**2 + s**2).sqrt() * torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=generator)
    x = SAMPLERS[sampler](
        gaussian_denoise(schedule, mean, std), schedule, x_T, schedule.grid(1000), generator=generator, **options
    )
    # Both posterior variances are right only in the limit of small steps (Ho et al. 2020, section 3.2).
    bias = 0.005
    assert abs(x.mean() - mean) < bias + 4 * std / n**0.5
    assert abs(x.std() - std) < bias + 4 * std / (2 * n) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("n", [1, 2, 7])
def test_any_grid_works_in_the_dtype_of_x_T(name, n, dtype):
    x = SAMPLERS[name](denoise, LINEAR, noise(dtype), LINEAR.grid(n), clip_x0=True)
    assert x.dtype == dtype
    assert x.isfinite().all()
    if n == 1:  # one step returns the first estimate of x0
        torch.testing.assert_close(x, denoise(noise(dtype), torch.tensor(1000.0, dtype=torch.float64)).clamp(-1, 1))


def test_on_step_sees_every_evaluation():
    seen = []
    SAMPLERS["ddim"](denoise, LINEAR, noise(), LINEAR.grid(5), on_step=lambda i, x, x0: seen.append((i, x, x0)))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[0][1], noise())


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize(
    ("ts", "message"),
    [
        ([], "at least 2 times"),
        ([1000.0], "at least 2 times"),
        ([500.0, 600.0, 0.0], "descend"),
        ([500.0, 500.0, 0.0], "descend"),
        ([[2.0, 1.0]], "one dimension"),
        ([1.0, -1.0], "t >= 0"),
    ],
)
def test_bad_grids_are_named(name, ts, message):
    with pytest.raises(UserError, match=message):
        SAMPLERS[name](denoise, LINEAR, noise(), torch.tensor(ts, dtype=torch.float64))


def test_bad_options_are_named():
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="eta is"):
            SAMPLERS["ddim"](denoise, LINEAR, noise(), LINEAR.grid(2), eta=eta)
    with pytest.raises(UserError, match="variance 'learned' is unknown"):
        SAMPLERS["ddpm"](denoise, LINEAR, noise(), LINEAR.grid(2), variance="learned")

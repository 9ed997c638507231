"""Samplers against diffusers' schedulers and torchdiffeq's solver, where these agree with the papers."""

import math

import diffusers
import pytest
import torch
from torchdiffeq import odeint

from fastdiff.diffusion.objectives import OBJECTIVES
from fastdiff.diffusion.samplers import SAMPLERS
from tests.diffusion.truths import ALL, gaussian_denoise, gaussian_flow, log_snr_grid, mixture_denoise

LINEAR = ALL["ddpm-linear"]
SHAPE = (2, 3, 4, 4)
FLOAT32 = {"rtol": 5e-6, "atol": 5e-6}  # of schedulers that cast their state to float32
FLOAT64 = {"rtol": 1e-9, "atol": 1e-9}


def eps_network(x, index):
    """A smooth stand-in for a network, far from linear in x and in the noise level."""
    return torch.tanh(1.3 * x) + 0.2 * torch.cos(index.to(x.dtype).reshape(-1, 1, 1, 1) / 100)


def denoise(x, t):
    return OBJECTIVES["eps"](LINEAR).denoise(eps_network, x, t)


def noise():
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ours(name, ts, **options):
    return SAMPLERS[name](denoise, LINEAR, noise(), ts, generator=seeded(), **options)


def run_scheduler(scheduler, x, **options):
    for index in scheduler.timesteps:
        x = scheduler.step(eps_network(x, index), index, x, **options).prev_sample
    return x.double()


def seeded():
    return torch.Generator().manual_seed(7)


def with_float64_tables(scheduler):
    # diffusers keeps its tables in float32; float64 ones make the comparison one of formulas.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


def on_grid(scheduler, ts):
    """A scheduler of the sigma / alpha kind on our grid, in float64."""
    scheduler.set_timesteps(len(ts) - 1)
    scheduler.sigmas = LINEAR.sigma(ts) / LINEAR.alpha(ts)
    scheduler.timesteps = ts[:-1] - 1
    return scheduler


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_over_1000_steps(variance, clip):
    scheduler = with_float64_tables(diffusers.DDPMScheduler(variance_type=variance, clip_sample=clip))
    scheduler.set_timesteps(1000)
    x = ours("ddpm", LINEAR.grid(1000), variance=variance.replace("_", "-"), clip_x0=clip)
    torch.testing.assert_close(x, run_scheduler(scheduler, noise(), generator=seeded()), **FLOAT64)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [10, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim(n, eta, spacing, clip):
    scheduler = with_float64_tables(diffusers.DDIMScheduler(clip_sample=clip, timestep_spacing=spacing))
    scheduler.set_timesteps(n)
    # With clipping, ours derives the noise from the clamped x0, which diffusers calls use_clipped_model_output.
    expected = run_scheduler(scheduler, noise(), generator=seeded(), eta=eta, use_clipped_model_output=clip)
    x = ours("ddim", LINEAR.grid(n, spacing=spacing), eta=eta, clip_x0=clip)
    torch.testing.assert_close(x, expected, **FLOAT64)


@pytest.mark.parametrize("n", [1, 2, 20])  # diffusers lowers other orders at the end of less than 15 steps
def test_dpmpp_2m(n):
    scheduler = on_grid(diffusers.DPMSolverMultistepScheduler(final_sigmas_type="zero"), LINEAR.grid(n))
    torch.testing.assert_close(ours("dpmpp-2m", LINEAR.grid(n)), run_scheduler(scheduler, noise()), **FLOAT32)


@pytest.mark.parametrize("n", [1, 2, 20])
def test_dpmpp_2m_sde(n):
    """With the same noise given to both."""
    ts = LINEAR.grid(n)
    scheduler = on_grid(
        diffusers.DPMSolverMultistepScheduler(final_sigmas_type="zero", algorithm_type="sde-dpmsolver++"), ts
    )
    generator, x = seeded(), noise()
    for index in scheduler.timesteps:
        z = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
        x = scheduler.step(eps_network(x, index), index, x, variance_noise=z).prev_sample
    torch.testing.assert_close(ours("dpmpp-2m-sde", ts), x.double(), **FLOAT32)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("n", [2, 9, 30])
def test_unipc_on_a_grid_that_ends_above_0(n, order):
    ts = LINEAR.grid(n + 1)[:-1]
    scheduler = on_grid(diffusers.UniPCMultistepScheduler(solver_order=order, lower_order_final=False), ts)
    torch.testing.assert_close(ours("unipc", ts, order=order), run_scheduler(scheduler, noise()), **FLOAT64)


@pytest.mark.parametrize("order", [1, 2])  # at order 3 diffusers also lowers the last step but one
def test_unipc_down_to_0(order):
    ts = LINEAR.grid(12)
    scheduler = on_grid(diffusers.UniPCMultistepScheduler(solver_order=order, final_sigmas_type="zero"), ts)
    torch.testing.assert_close(ours("unipc", ts, order=order), run_scheduler(scheduler, noise()), **FLOAT64)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("euler", diffusers.EulerDiscreteScheduler), ("euler-ancestral", diffusers.EulerAncestralDiscreteScheduler)],
)
def test_euler_and_euler_ancestral(name, scheduler):
    """These keep x / alpha, of which float32 loses all too much where alpha is small: hence not from t = 1000."""
    ts = torch.arange(600, -1, -30, dtype=torch.float64)
    scheduler = on_grid(scheduler(), ts)
    generator, x = seeded(), noise() / LINEAR.alpha(ts[0])
    for i, index in enumerate(scheduler.timesteps):
        eps = eps_network(x.double() * LINEAR.alpha(ts[i]), index)
        x = scheduler.step(eps, index, x.double(), generator=generator).prev_sample
    torch.testing.assert_close(ours(name, ts), x.double(), **FLOAT32)


def test_euler_on_edm_s_own_schedule():
    schedule, n = ALL["edm"], 18
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(n)
    ts = schedule.grid(n, spacing="karras")
    torch.testing.assert_close(scheduler.sigmas.double(), ts, rtol=1e-6, atol=0)
    exact, x = gaussian_denoise(schedule), 80.0 * noise()
    for i, index in enumerate(scheduler.timesteps):
        # The network's output for this x0_hat, by the preconditioning that the scheduler undoes.
        c_skip, c_out = 0.25 / (ts[i] ** 2 + 0.25), 0.5 * ts[i] / (ts[i] ** 2 + 0.25).sqrt()
        scheduler.scale_model_input(x, index)
        x = scheduler.step((exact(x.double(), ts[i]) - c_skip * x.double()) / c_out, index, x).prev_sample
    torch.testing.assert_close(SAMPLERS["euler"](exact, schedule, 80.0 * noise(), ts), x.double(), **FLOAT32)


@pytest.mark.parametrize("churn", [0.0, 8.0])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_algorithm_2_of_edm_as_it_is_written(name, churn):
    """Karras et al. 2022, algorithm 2, line by line in sigma."""
    schedule, n = ALL["edm"], 18
    ts, exact = schedule.grid(n, spacing="karras"), gaussian_denoise(schedule)
    x, generator = 80.0 * noise(), seeded()
    for i in range(n):
        gamma = min(churn / n, math.sqrt(2) - 1) if 0.05 <= ts[i] <= 50.0 else 0.0
        eps = 1.003 * torch.randn(SHAPE, dtype=torch.float64, generator=generator) if churn else 0.0
        t_hat = ts[i] + gamma * ts[i]
        x_hat = x + (t_hat**2 - ts[i] ** 2).sqrt() * eps
        d = (x_hat - exact(x_hat, t_hat)) / t_hat
        x = x_hat + (ts[i + 1] - t_hat) * d
        if name == "heun" and ts[i + 1] != 0:
            d_next = (x - exact(x, ts[i + 1])) / ts[i + 1]
            x = x_hat + (ts[i + 1] - t_hat) * (0.5 * d + 0.5 * d_next)
    options = {"S_churn": churn, "S_tmin": 0.05, "S_tmax": 50.0, "S_noise": 1.003}
    result = SAMPLERS[name](exact, schedule, 80.0 * noise(), ts, generator=seeded(), **options)
    torch.testing.assert_close(result, x, **FLOAT64)


@pytest.mark.parametrize("n", [1, 2, 10])
def test_euler_on_the_flow_schedule(n):
    schedule = ALL["flow"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    ts = schedule.grid(n)
    scheduler.set_timesteps(sigmas=ts[:-1].tolist())
    exact, x = mixture_denoise(schedule), noise()
    for i, index in enumerate(scheduler.timesteps):
        velocity = (x.double() - exact(x.double(), ts[i])) / ts[i]
        x = scheduler.step(velocity, index, x.double()).prev_sample
    torch.testing.assert_close(SAMPLERS["euler"](exact, schedule, noise(), ts).float(), x.float(), **FLOAT32)


# Of 400 steps: about 4 times what is measured, and below what the sampler of the next lower order has.
ODE_ERRORS = {"heun": 1e-4, "dpmpp-2m": 3e-4, "dpmpp-3m": 1e-5, "unipc": 1e-6}


@pytest.mark.parametrize("schedule", ["cosine", "edm", "flow"])
@pytest.mark.parametrize("name", ODE_ERRORS)
def test_the_probability_flow_by_torchdiffeq(name, schedule):
    """d(x / alpha) / d rho = (x / alpha - x0_hat) / rho, rho = sigma / alpha, for two modes: far from linear."""
    schedule = ALL[schedule]
    exact, ts = mixture_denoise(schedule), log_snr_grid(schedule, -6.0, 4.0, 400)

    def slope(rho, x):
        t = schedule.t_of_log_snr(-2 * rho.log())
        return (x - exact(schedule.alpha(t) * x, t)) / rho

    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64) * schedule.sigma(ts[0])
    rho = (schedule.sigma(ts) / schedule.alpha(ts))[[0, -1]]
    expected = schedule.alpha(ts[-1]) * odeint(slope, x_T / schedule.alpha(ts[0]), rho, rtol=1e-9, atol=1e-9)[-1]
    x = SAMPLERS[name](exact, schedule, x_T.reshape(1, 1, 1, -1), ts).flatten()
    torch.testing.assert_close(x, expected, rtol=0, atol=ODE_ERRORS[name])


def test_dpmpp_3m_is_of_third_order_where_the_library_s_is_of_second():
    """diffusers weighs the second difference by half (see dpmpp_3m); float32 states limit how fine this can be."""
    x_T = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, 1, 2, 4)
    errors = {"ours": [], "diffusers": []}
    for n in (20, 40):
        ts = log_snr_grid(LINEAR, -6.0, 2.0, n)
        scheduler = diffusers.DPMSolverMultistepScheduler(
            solver_order=3, prediction_type="sample", lower_order_final=False
        )
        scheduler = on_grid(scheduler, ts)
        x = x_T
        for i, index in enumerate(scheduler.timesteps):
            x = scheduler.step(gaussian_denoise(LINEAR)(x.double(), ts[i]), index, x.double()).prev_sample
        exact = gaussian_flow(LINEAR, x_T, ts[0], ts[-1])
        errors["diffusers"].append(float((x - exact).abs().max()))
        x = SAMPLERS["dpmpp-3m"](gaussian_denoise(LINEAR), LINEAR, x_T, ts)
        errors["ours"].append(float((x - exact).abs().max()))
    order = {who: math.log2(e[0] / e[1]) for who, e in errors.items()}
    assert order["ours"] > 2.7
    assert abs(order["diffusers"] - 2) < 0.3

"""Data whose denoiser, density and probability flow are known exactly."""

import torch

from fastdiff.diffusion.schedules import DISCRETE, SCHEDULES, make_schedule

MEAN, STD = 0.3, 0.5
# Two modes in each dimension, at MODES with weights WEIGHTS.
MODES, WEIGHTS, WIDTH = (-0.7, 0.5), (0.3, 0.7), 0.1


def all_schedules():
    """Every schedule by name, and the discrete ones with zero terminal signal."""
    made = {name: make_schedule(name) for name in SCHEDULES}
    return made | {f"{name}-zero": make_schedule(name, zero_terminal_snr=True) for name in DISCRETE}


ALL = all_schedules()


def time(value):
    """A 0-dim float64 time."""
    return torch.tensor(value, dtype=torch.float64)


def gaussian_denoise(schedule, mean=MEAN):
    """E[x0 | x_t] for x0 ~ N(mean, STD^2)."""

    def denoise(x, t, *r):
        a, s = schedule.alpha(t), schedule.sigma(t)
        return mean + (a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * mean)).to(x.dtype)

    return denoise


def gaussian_marginal(schedule, t):
    """Mean and standard deviation of x_t."""
    a, s = schedule.alpha(t), schedule.sigma(t)
    return a * MEAN, (a**2 * STD**2 + s**2).sqrt()


def gaussian_flow(schedule, x, t, s):
    """The probability flow keeps the standardised value."""
    (mean_t, std_t), (mean_s, std_s) = gaussian_marginal(schedule, t), gaussian_marginal(schedule, s)
    return mean_s + std_s * (x - mean_t) / std_t


def mixture_log_terms(schedule, x, t):
    """log of weight times density of x_t under each mode, (modes, *x.shape), and the modes' variance."""
    a, s = schedule.alpha(t), schedule.sigma(t)
    variance = a**2 * WIDTH**2 + s**2
    modes = torch.tensor(MODES, dtype=x.dtype).reshape(-1, *[1] * x.ndim)
    weights = torch.tensor(WEIGHTS, dtype=x.dtype).reshape(modes.shape)
    return weights.log() - 0.5 * ((x - a * modes) ** 2 / variance + (2 * torch.pi * variance).log()), variance


def mixture_denoise(schedule):
    """E[x0 | x_t] for the two modes."""

    def denoise(x, t, *r):
        a = schedule.alpha(t)
        terms, variance = mixture_log_terms(schedule, x, t)
        modes = torch.tensor(MODES, dtype=x.dtype).reshape(-1, *[1] * x.ndim)
        return (terms.softmax(0) * (modes + a * WIDTH**2 / variance * (x - a * modes))).sum(0)

    return denoise


def log_snr_grid(schedule, first, last, n):
    """n steps evenly in log-SNR, between finite ends."""
    return schedule.t_of_log_snr(torch.linspace(first, last, n + 1, dtype=torch.float64))

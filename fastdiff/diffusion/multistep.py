"""Multistep samplers: exponential integrators in the log-SNR, which reuse the estimates of earlier steps.

With lambda = log(alpha / sigma) and h = lambda_s - lambda_t, the probability-flow ODE from t to s has the exact
solution (Lu et al. 2022, DPM-Solver++, proposition 4.1)

    x_s = (sigma_s / sigma_t) x_t + alpha_s * integral over lambda of exp(lambda - lambda_s) x0_hat(lambda)

and a method of order k puts a polynomial through the last k estimates in its place. h is infinite in a step from
alpha = 0 and in one to sigma = 0: a ratio h / h_earlier with an infinite h_earlier is 0. So the order rises from 1
after the start, and a step with infinite h is of first order.
"""

import math
from itertools import accumulate, islice, takewhile

import torch
from torch import Tensor

from fastdiff.diffusion.plan import Denoise, Noise, Plan, Rows, State, linear, step_ends
from fastdiff.diffusion.schedule import Schedule
from fastdiff.errors import UserError


def dpmpp_2m(schedule: Schedule, ts: Tensor) -> Plan:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation a step."""
    alpha_t, sigma_t, alpha_s, sigma_s = step_ends(schedule, ts)
    h = _log_steps(alpha_t, sigma_t, alpha_s, sigma_s)
    # Algorithm 2, lines 8 and 9, with 1 / r = h / h_earlier: D = (1 + 1 / (2r)) x0_hat - 1 / (2r) x0_hat_earlier.
    half = 0.5 * _ratio(h, _earlier(h, 1))
    whole = -alpha_s * torch.expm1(-h)
    from_x0 = [whole * (1.0 + half), -whole * half]
    return linear(ts, sigma_s / sigma_t, from_x0)


def dpmpp_2m_sde(schedule: Schedule, ts: Tensor) -> Plan:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5): the reverse SDE, one evaluation a step."""
    alpha_t, sigma_t, alpha_s, sigma_s = step_ends(schedule, ts)
    h = _log_steps(alpha_t, sigma_t, alpha_s, sigma_s)
    # x_s = sigma_s / sigma_t e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z, with D as in 2M.
    half = 0.5 * _ratio(h, _earlier(h, 1))
    share = -torch.expm1(-2.0 * h)
    from_x0 = [alpha_s * share * (1.0 + half), -alpha_s * share * half]
    from_x_t, std = sigma_s / sigma_t * torch.exp(-h), sigma_s * share.sqrt()
    return linear(ts, from_x_t, from_x0, std)


def dpmpp_3m(schedule: Schedule, ts: Tensor) -> Plan:
    """DPM-Solver++(3M): third order, one evaluation a step.

    The parabola through the last three estimates, integrated exactly (proposition 4.1). The paper's
    code, and diffusers after it, weigh the second difference by half of that, which lowers the order to 2.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = step_ends(schedule, ts)
    h = _log_steps(alpha_t, sigma_t, alpha_s, sigma_s)
    h_1, h_2 = _earlier(h, 1), _earlier(h, 2)
    # With u = (lambda - lambda_t) / h, Newton's form is x0(u) = D + u first + u (u + h_1 / h) second, where
    # first = (D - D_1) h / h_1 and second = (first - (D_1 - D_2) h / h_2) h / (h_1 + h_2).
    r_1, r_2, r_12 = _ratio(h, h_1), _ratio(h, h_2), _ratio(h, h_1 + h_2)
    share = torch.where(h_1.isinf(), 0.0, h_1 / (h_1 + h_2))
    # Integrals over a step of e^(lambda - lambda_s) times 1, u and u^2 (phi functions).
    c_0 = -torch.expm1(-h)
    c_1 = 1.0 - c_0 / h
    c_2 = 1.0 - 2.0 * c_1 / h
    second = r_12 * c_2 + share * c_1
    first, second = alpha_s * r_1 * (c_1 + second), alpha_s * r_2 * second
    from_x0 = [alpha_s * c_0 + first, -first - second, second]
    return linear(ts, sigma_s / sigma_t, from_x0)


def unipc(schedule: Schedule, ts: Tensor, *, order: int = 3) -> Plan:
    """UniPC on the estimate of x0, with B(h) = e^h - 1 (Zhao et al. 2023): one evaluation a step.

    The estimate at s first corrects the step that led to s (UniC-p), then predicts the next (UniP-p). The whole is of
    order p + 1 (theorem 3.1).

    Args:
        order: p, 1 to 3; lower where there are fewer earlier estimates, and 1 in a step to sigma = 0.
    """
    if order not in (1, 2, 3):
        raise UserError(f"order is {order}, but unipc has orders 1, 2 and 3.")
    order = int(order)
    ends = step_ends(schedule, ts)
    h = _log_steps(*ends).tolist()
    _, sigma_t, alpha_s, sigma_s = (end.tolist() for end in ends)
    predict, correct = [], []
    for i in range(len(h)):
        points = _reachable(h[:i], order - 1) if math.isfinite(h[i]) else []
        padding = [0.0] * (order - 1 - len(points))
        scale, whole = sigma_s[i] / sigma_t[i], alpha_s[i] * -math.expm1(-h[i])
        predict.append([scale, *[whole * weight for weight in _unified(h[i], points)], *padding])
        # The correction of this step is done in the next row, with the estimate at its end.
        *known, new = _unified(h[i], [*points, -1.0])
        correct.append([0.0, scale, *[whole * weight for weight in (new, *known)], *padding])
    # Row 0 has nothing to correct and keeps its x.
    correct = [[1.0] + [0.0] * (order + 2), *correct[:-1]]
    table = torch.tensor([[*a, *b] for a, b in zip(correct, predict, strict=True)], dtype=torch.float64)
    return [Rows(unified_step, ts.double().cpu()[:-1, None], table, memory=order + 1)]


def unified_step(denoise: Denoise, noise: Noise, t: Tensor, row: Tensor, state: State) -> tuple[State, Tensor]:
    """A row: how the last step is corrected (weights of its result, of where it started, of each estimate), and how the
    next is predicted (weights of the corrected x, of each estimate but the oldest)."""
    x, last, *past = state
    order = len(past)
    x0 = denoise(x, t[0])
    weights, estimates = row.unbind(), [x0, *past]
    corrected = weights[0] * x + weights[1] * last
    for weight, estimate in zip(weights[2 : 3 + order], estimates, strict=True):
        corrected = corrected + weight * estimate
    x = weights[3 + order] * corrected
    for weight, estimate in zip(weights[4 + order :], estimates, strict=False):
        x = x + weight * estimate
    return (x, corrected, *estimates[:order]), x0


def _reachable(earlier: list[float], count: int) -> list[float]:
    """How far back in log-SNR the estimates of up to `count` steps before lie; none from before an infinite step."""
    return list(accumulate(islice(takewhile(math.isfinite, reversed(earlier)), count)))


def _unified(h: float, distances: list[float]) -> list[float]:
    """Weights of one UniP or UniC step of size h in log-SNR (Zhao et al. 2023, section 3, on x0); they add up to 1.

    x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) (sum of weight * estimate).

    Args:
        distances: how far before t the earlier estimates lie, > 0; -1 stands for the estimate at s (UniC).

    Returns:
        Of the estimate at t, and of each in `distances`.
    """
    r = [1.0 if distance < 0 else -distance / h for distance in distances]
    if len(r) <= 1:
        a = [0.5] * len(r)  # with a single point, whatever B(h) is (the paper's choice too)
    else:
        # R a = phi / B(h): row j of R holds r^j, and phi_j / B = (j + 1)! psi_(j + 1)(-h) / (e^-h - 1).
        psi, factorial, phi = math.expm1(-h), 1.0, []
        for j in range(1, len(r) + 1):
            factorial *= j
            psi = psi / -h - 1.0 / factorial
            phi.append(psi * factorial / math.expm1(-h))
        R = torch.tensor([[point**j for point in r] for j in range(len(r))], dtype=torch.float64)
        a = torch.linalg.solve(R, torch.tensor(phi, dtype=torch.float64)).tolist()
    weights = [share / point for share, point in zip(a, r, strict=True)]  # of the differences to the estimate at t
    return [1.0 - sum(weights), *weights]


def _log_steps(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """h = lambda_s - lambda_t of each step, (n,) float64, above 0; inf from alpha = 0 and to sigma = 0."""
    return -torch.log(sigma_s / sigma_t * (alpha_t / alpha_s))


def _earlier(h: Tensor, k: int) -> Tensor:
    """The h of k steps before; inf where there is none."""
    return torch.cat([torch.full((min(k, len(h)),), torch.inf, dtype=h.dtype), h[:-k]])


def _ratio(h: Tensor, earlier: Tensor) -> Tensor:
    """h / earlier, and 0 in a step with infinite h."""
    return torch.where(h.isinf(), 0.0, h / earlier)

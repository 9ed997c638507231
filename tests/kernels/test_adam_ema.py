"""adam_ema_ beside torch.optim, and its bias corrections over a long run."""

import math

import pytest
import torch
import triton
import triton.language as tl

from kernels import adam_ema_
from kernels.adam_ema import one_minus_exp
from kernels.launch import INTERPRETED
from tests.numerics import assert_as_accurate


def run_ours(param, grads, *, lr, decay, **options):
    state = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
    param, ema, half = param.clone(), param.clone(), torch.empty_like(param, dtype=torch.bfloat16)
    scalars = {
        name: torch.tensor(v, dtype=torch.float64, device=param.device)
        for name, v in {"lr": lr, "decay": decay, "clip": 0.5}.items()
    }
    step = torch.zeros((), dtype=torch.int64, device=param.device)
    for grad in grads:
        step += 1
        adam_ema_(param, grad, **state, ema=ema, half=half, step=step, **scalars, **options)
    return param, ema, half


def run_torch(param, grads, dtype, *, lr, decay, weight_decay, **options):
    """The trusted optimizer: Adam, or AdamW where there is a weight decay; then a separate average."""
    param = param.to(dtype, copy=True).requires_grad_()
    ema = param.detach().clone()
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    optimizer = kind([param], lr=lr, weight_decay=weight_decay, **options)
    for grad in grads:
        param.grad = grad.to(dtype) * 0.5
        optimizer.step()
        ema.lerp_(param.detach(), 1 - decay)
    return param.detach(), ema


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_a_hundred_steps_follow_torch_optim(weight_decay, device):
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(1500, generator=generator).to(device)
    grads = [torch.randn(1500, generator=generator).to(device) * 10 ** (i % 5 - 3) for i in range(100)]
    options = {"lr": 1e-2, "decay": 0.99, "weight_decay": weight_decay}
    ours, our_ema, half = run_ours(param, grads, **options)
    eager, eager_ema = run_torch(param, grads, torch.float32, **options)
    exact, exact_ema = run_torch(param, grads, torch.float64, **options)
    assert_as_accurate(ours, eager, exact, "param")
    assert_as_accurate(our_ema, eager_ema, exact_ema, "ema")
    assert (exact - param).abs().max() > 0.1  # it moved
    assert torch.equal(half, ours.bfloat16())


@triton.jit
def correction_kernel(u_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, one_minus_exp(tl.load(u_ptr + i, mask=i < n, other=0.0)), mask=i < n)


def test_bias_corrections_keep_six_digits_from_the_first_step_to_the_millionth(device):
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("a Triton function: in the interpreter or on a GPU")
    steps = sorted({round(10 ** (i / 20)) for i in range(121)})
    for beta in (0.9, 0.95, 0.999, 0.9999):
        exact = torch.tensor([-math.expm1(t * math.log(beta)) for t in steps], dtype=torch.float64)
        u = torch.tensor(steps, dtype=torch.float32, device=device) * torch.tensor(-math.log(beta), dtype=torch.float32)
        ours = torch.empty_like(u)
        correction_kernel[(1,)](u, ours, len(steps), BLOCK=128)
        assert (ours.cpu().double() / exact - 1).abs().max() < 1e-6


def arguments(n=5):
    tensors = {name: torch.ones(n) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "ema")}
    return (
        tensors
        | {"half": None, "step": torch.tensor(1)}
        | {name: torch.tensor(0.5) for name in ("lr", "decay", "clip")}
    )


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "grad must be contiguous", {"grad": torch.ones(6)}),
        (ValueError, "lr must be one element", {"lr": torch.ones(2)}),
        (ValueError, "beta1 and beta2", {"beta2": 1.0}),
        (TypeError, "ema must be float32", {"ema": torch.ones(5, dtype=torch.bfloat16)}),
        (TypeError, "decay must be float32 or float64", {"decay": torch.tensor(1)}),
    ],
)
def test_refusals_name_the_argument(error, message, change):
    with pytest.raises(error, match=message):
        adam_ema_(**(arguments() | change))


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_a_clip_of_nothing_skips_the_step(clip):
    """Also where the gradient is not finite, which no factor would make harmless."""
    tensors = [torch.ones(5) * k for k in range(1, 6)]
    param, grad, exp_avg, exp_avg_sq, ema = tensors
    half = torch.zeros(5, dtype=torch.bfloat16)
    grad[1] = float("nan")
    before = [t.clone() for t in (*tensors, half)]
    scalars = {
        name: torch.tensor(value) for name, value in {"step": 3.0, "lr": 0.1, "decay": 0.9, "clip": clip}.items()
    }
    adam_ema_(param, grad, exp_avg, exp_avg_sq, ema, half, **scalars)
    for was, now in zip(before, (*tensors, half), strict=True):
        assert torch.equal(was, now) or now is grad

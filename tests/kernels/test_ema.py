"""ema_update_ beyond its contract: slow decays, and what it refuses."""

import pytest
import torch

from kernels import ema_update_
from tests.numerics import assert_as_accurate


def test_a_thousand_slow_steps_converge_as_the_formula_says(device):
    """At decay 0.9999 a step moves the average by 1e-4 of the distance, below bf16's resolution of the value."""
    ema, params = torch.ones(100, device=device), torch.full((100,), 2.0, device=device)
    decay = torch.tensor(0.9999, dtype=torch.float64, device=device)
    eager = ema.clone()
    for _ in range(200):
        ema_update_(ema, params, decay)
        eager.lerp_(params, 1e-4)
    exact = 2 - (2 - torch.ones(100, dtype=torch.float64, device=device)) * 0.9999**200
    assert_as_accurate(ema, eager, exact)


def test_the_decay_is_read_when_the_op_runs(device):
    ema, params, decay = torch.zeros(5, device=device), torch.ones(5, device=device), torch.tensor([0.5], device=device)
    ema_update_(ema, params, decay)
    decay.fill_(1.0)
    ema_update_(ema, params, decay)
    assert torch.equal(ema, torch.full((5,), 0.5, device=device))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "of one shape", {"params": torch.ones(6)}),
        (ValueError, "contiguous", {"params": torch.ones(10)[::2]}),
        (ValueError, "decay must be one element", {"decay": torch.ones(2)}),
        (TypeError, "ema must be float32", {"ema": torch.ones(5, dtype=torch.bfloat16)}),
        (TypeError, "params must be floating", {"params": torch.ones(5, dtype=torch.int64)}),
    ],
)
def test_refusals_name_the_argument(error, message, change):
    with pytest.raises(error, match=message):
        ema_update_(**({"ema": torch.ones(5), "params": torch.ones(5), "decay": torch.tensor(0.9)} | change))

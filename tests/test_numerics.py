"""The tolerance rule lets through what it should and nothing else."""

import pytest
import torch

from tests.numerics import assert_as_accurate, ulp


def test_ulp_is_the_distance_to_the_next_number():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.tensor([1.0, 1.5, 3.0, 1000.0, 0.01], dtype=dtype)
        above = torch.nextafter(x, torch.full_like(x, torch.inf))
        assert torch.equal(ulp(x, dtype), above.double() - x.double())


def test_four_times_eager_and_one_ulp_is_the_edge():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = exact + torch.tensor([0.0, 1e-3], dtype=torch.float64)
    assert_as_accurate(exact + 3.9e-3, eager, exact)
    with pytest.raises(AssertionError, match="times the allowed"):
        assert_as_accurate(exact + 4.1e-3, eager, exact)


def test_zeros_never_pass():
    exact = torch.randn(100, dtype=torch.float64)
    with pytest.raises(AssertionError, match="times the allowed"):
        assert_as_accurate(torch.zeros(100, dtype=torch.bfloat16), exact.bfloat16(), exact)


@pytest.mark.parametrize("ours", [[1.0, torch.inf], [torch.nan, torch.nan], [1.0, 5.0], [1.0, -torch.inf]])
def test_non_finite_values_must_be_the_same(ours):
    exact = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    with pytest.raises(AssertionError, match="other"):
        assert_as_accurate(torch.tensor(ours), exact.float(), exact)
    assert_as_accurate(exact.float(), exact.float(), exact)

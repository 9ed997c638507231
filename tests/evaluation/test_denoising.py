from itertools import chain

import pytest
import torch
from torch import nn

from fastdiff.diffusion.objectives import make_objective
from fastdiff.evaluation.denoising import LEVEL, DenoisingError


class Gaussian(nn.Module):
    """The exact network of objective x0 for data N(0, s^2) on schedule edm, up to a factor."""

    def __init__(self, s: float, scale: float = 1.0) -> None:
        super().__init__()
        self.s, self.scale = s, scale

    def forward(self, x, t):
        return self.scale * x * self.s**2 / (self.s**2 + LEVEL**2)


def test_the_error_of_the_exact_denoiser_is_the_least():
    s, objective = 0.5, make_objective("x0", schedule="edm", weighting="uniform")
    objective.precondition = lambda x_t, t: (x_t, t)
    x0 = s * torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    error = DenoisingError(Gaussian(s), objective, x0, {})()
    assert error == pytest.approx(1 / (1 / s**2 + 1 / LEVEL**2), rel=0.02)  # the variance that is left
    seen = []
    in_parts = DenoisingError(Gaussian(s), objective, x0, {"labels": torch.arange(256)}, batch_size=100)
    in_parts.network.forward = lambda x, t, labels: (seen.append(labels.tolist()), Gaussian(s)(x, t))[1]
    assert in_parts() == pytest.approx(error, rel=1e-5)
    assert list(map(len, seen)) == [100, 100, 56]
    assert [*chain(*seen)] == list(range(256))
    worse = DenoisingError(Gaussian(s, 1.2), objective, x0, {})
    assert worse() > 1.05 * error
    assert worse() == worse() == DenoisingError(Gaussian(s, 1.2), objective, x0, {})()  # the same noise each time

import pytest
import torch

from fastdiff.diffusion.objectives import OBJECTIVES
from fastdiff.diffusion.schedules import SCHEDULES
from fastdiff.errors import UserError

CASES = [(o, s) for o in OBJECTIVES for s in SCHEDULES]


def draw(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(n, 3, 4, 4, dtype=torch.float64, generator=generator) * 2 - 1
    return x0, torch.randn(x0.shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_exact_target_has_zero_loss_and_recovers_x0(kind, name):
    objective = OBJECTIVES[kind](SCHEDULES[name](T=1000))
    x0, eps = draw()
    t = torch.linspace(1, 1000, 64).round().double()
    target = objective.target(x0, t, eps)
    x_t = objective.add_noise(x0, t, eps)
    seen = {}

    def exact(x, c_noise):
        seen.update(x=x, c_noise=c_noise)
        return target

    assert torch.equal(objective.loss(exact, x0, t, eps), torch.zeros(64, dtype=torch.float64))
    assert torch.equal(seen["x"], x_t)
    assert torch.equal(seen["c_noise"], t - 1)
    # Rounding in x_t is magnified by 1 / alpha on the way back.
    error = (objective.denoise(exact, x_t, t) - x0).abs().amax((1, 2, 3))
    assert (error <= 1e-12 + 1e-15 / objective.schedule.alpha(t)).all()


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_one_time_for_all_images_is_the_same_as_one_each(kind, name):
    objective = OBJECTIVES[kind](SCHEDULES[name](T=1000))
    x, _ = draw(3)
    t = torch.tensor(500.0, dtype=torch.float64)
    assert torch.equal(
        objective.denoise(lambda x, c: x.sin() * c[:, None, None, None], x, t),
        objective.denoise(lambda x, c: x.sin() * c[:, None, None, None], x, t.expand(3)),
    )


def test_loss_is_a_mean_over_elements_with_conditions_passed_on():
    objective = OBJECTIVES["eps"](SCHEDULES["ddpm-linear"](T=1000))
    x0, eps = draw(2)
    seen = {}

    def off_by(x, c_noise, label):
        seen["label"] = label
        return eps + label[:, None, None, None]

    loss = objective.loss(off_by, x0, torch.tensor([1, 1000]), eps, label=torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(loss, torch.tensor([4.0, 9.0], dtype=torch.float64))
    assert "label" in seen


def test_loss_is_float32_for_a_bf16_prediction():
    objective = OBJECTIVES["eps"](SCHEDULES["ddpm-linear"](T=1000))
    x0, eps = (x.float() for x in draw(2))
    loss = objective.loss(lambda x, c: x.bfloat16(), x0, torch.tensor([1, 1000]), eps)
    assert loss.dtype == torch.float32


def test_unknown_weighting_is_named():
    with pytest.raises(UserError, match="weighting 'loud' is unknown; choose one of uniform"):
        OBJECTIVES["eps"](SCHEDULES["ddpm-linear"](), weighting="loud")

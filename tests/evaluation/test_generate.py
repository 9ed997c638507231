import pytest
import torch

from fastdiff.diffusion import plan
from fastdiff.diffusion.objectives import make_objective
from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.diffusion.schedules import make_schedule
from fastdiff.errors import UserError
from fastdiff.evaluation.evaluate import evaluate
from fastdiff.evaluation.generate import Generator, SamplerSettings, parse_options

OBJECTIVE = make_objective("eps", schedule="ddpm-linear", timesteps=100, weighting="uniform")
SHAPE = (3, 4, 4)


def model(x, t):
    return 0.5 * x


def drawer(name="ddim", steps=5, eta=0.0, spacing="auto", extra=None, batch_size=4, model=model, **options):
    return Generator(
        model, OBJECTIVE, SamplerSettings(name, steps, eta, spacing, extra or {}), shape=SHAPE,
        batch_size=batch_size, device=torch.device("cpu"), **options,
    )  # fmt: skip


def draw(n, *, seed=0, **options):
    return list(drawer(**options).batches(n, seed=seed))


@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_samples_depend_on_the_seed_and_not_on_how_many_are_drawn(name, eta):
    few, many = (torch.cat(draw(n, name=name, eta=eta)) for n in (6, 11))
    assert (few.dtype, few.shape, many.shape) == (torch.uint8, (6, *SHAPE), (11, *SHAPE))
    assert torch.equal(few, many[:6])
    assert not torch.equal(few, torch.cat(draw(6, name=name, eta=eta, seed=1)))
    assert len({x.numpy().tobytes() for x in many}) == 11


def test_every_batch_has_one_size_for_the_network():
    sizes = set()

    def spy(x, t):
        sizes.add((x.shape, t.shape, x.is_contiguous(memory_format=torch.channels_last)))
        return model(x, t)

    assert [len(b) for b in draw(10, model=spy)] == [4, 4, 2]
    assert sizes == {((4, *SHAPE), (4,), True)}
    sizes.clear()
    assert [len(b) for b in draw(3, model=spy)] == [3]
    assert sizes == {((3, *SHAPE), (3,), True)}


def test_the_networks_own_bf16_keeps_the_state_in_float32():
    seen = []

    class Spy(torch.nn.Conv2d):
        def __init__(self):
            super().__init__(3, 3, 1)

        def forward(self, x, t):
            out = super().forward(x)
            seen.append((x.dtype, out.dtype, self.weight.dtype))
            return out

    list(drawer(steps=2, model=Spy(), bf16=True).batches(2, seed=0))
    assert set(seen) == {(torch.float32, torch.bfloat16, torch.bfloat16)}


def test_the_trajectory_ends_where_sampling_ends():
    x_t, x0_hat, times = drawer(steps=20).trajectory(seed=3, samples=2, columns=5)
    assert x_t.shape == x0_hat.shape == (2, 5, *SHAPE)
    assert times == sorted(times, reverse=True)
    assert times[0] == 100.0
    (final,) = draw(2, steps=20, seed=3, batch_size=2)
    assert torch.equal(x0_hat[:, -1], final)  # the last step returns its estimate of x0
    assert drawer("ddpm", 1).trajectory(seed=3, samples=1, columns=9)[2] == [100.0]


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_draws_images_and_has_a_trajectory(name):
    x_t, x0_hat, times = drawer(name, 6).trajectory(seed=3, samples=2, columns=4)
    assert x_t.shape == x0_hat.shape == (2, 4, *SHAPE)
    grid = SamplerSettings(name, 6).times(OBJECTIVE.schedule)
    assert times == [grid[i].item() for i in (0, 2, 3, 5)]
    (final,) = draw(2, name=name, steps=6, seed=3, batch_size=2)
    assert torch.equal(x0_hat[:, -1], final)


def test_one_step_of_ddim_is_one_of_consistency_and_two_have_a_grid_of_their_own():
    one, other = (draw(2, name=name, steps=1) for name in ("ddim", "consistency"))
    assert torch.equal(one[0], other[0])
    schedule = make_schedule("edm")
    assert SamplerSettings("consistency", 2).times(schedule).tolist() == pytest.approx([80.0, 0.821, 0.0])
    settings = SamplerSettings("consistency", 3, last_level=3.0)
    roots = settings.times(schedule)[:3] ** (1 / 7)
    assert roots.diff().diff().abs().item() < 1e-9
    assert settings.label == "consistency (last_level=3)"
    assert SamplerSettings("ddim", 3, last_level=3.0).label == "ddim"
    assert torch.equal(SamplerSettings("consistency", 3, spacing="karras").times(schedule), schedule.grid(3))
    with pytest.raises(UserError, match="--last-level is 90, but must lie above 0 and below 80"):
        SamplerSettings("consistency", 2, last_level=90.0).times(schedule)


def test_each_image_is_drawn_with_its_own_condition_and_the_last_batch_is_filled_up():
    seen = []

    def conditional(x, t, *, labels):
        seen.append(labels.tolist())
        return 0.5 * x

    list(drawer(steps=1, model=conditional).batches(6, seed=0, conditions={"labels": torch.arange(6)}))
    assert seen == [[0, 1, 2, 3], [4, 5, 5, 5]]


def test_spacing_and_options_reach_the_sampler_and_the_label():
    plain = draw(2, name="unipc", steps=9)[0]
    assert not torch.equal(plain, draw(2, name="unipc", steps=9, spacing="log-snr")[0])
    assert not torch.equal(plain, draw(2, name="unipc", steps=9, extra={"order": 1})[0])
    settings = SamplerSettings("heun", 9, 0.0, "karras", parse_options("heun", ["S_churn=40", "S_noise=1.003"]))
    assert settings.extra == {"S_churn": 40.0, "S_noise": 1.003}
    assert settings.label == "heun (karras, S_churn=40, S_noise=1.003)"
    for each, count in ((SamplerSettings("heun", 9), 17), (SamplerSettings("ddim", 9), 9)):
        assert plan.evaluations(each.plan(OBJECTIVE.schedule)) == count
    corrected = SamplerSettings("predictor-corrector", 9, extra={"corrector_steps": 2})
    assert plan.evaluations(corrected.plan(OBJECTIVE.schedule)) == 25


def test_bad_requests_are_named():
    with pytest.raises(UserError, match="sampler 'rk45' is unknown; choose one of ddpm, ddim, euler"):
        SamplerSettings("rk45", 5)
    with pytest.raises(UserError, match="order: heun has no such option; it has S_churn, S_noise, S_tmax, S_tmin"):
        SamplerSettings("heun", 5, extra={"order": 2})
    with pytest.raises(UserError, match="eta: ddim has no such option; it has none"):
        parse_options("ddim", ["eta=1"])
    with pytest.raises(UserError, match="--options order=two: order of unipc is of type int"):
        parse_options("unipc", ["order=two"])
    with pytest.raises(UserError, match="--options order is not of the form NAME=VALUE"):
        parse_options("unipc", ["order"])
    with pytest.raises(UserError, match="spacing 'dense' is unknown"):
        draw(2, spacing="dense")
    with pytest.raises(UserError, match="--eta belongs to ddim"):
        SamplerSettings("ddpm", 5, 0.5)
    for n, batch_size in ((0, 4), (4, 0)):
        with pytest.raises(UserError, match="must be at least 1"):
            draw(n, batch_size=batch_size)
    with pytest.raises(UserError, match="101 sampling steps"):
        draw(2, steps=101)


class CountingDistance:
    sums = ()
    metric, reference = "fd_count", "nothing"

    class extractor:
        name, size = "count", 4

    def __init__(self):
        self.seen = []

    def reset(self):
        self.seen.clear()

    def update(self, images):
        self.seen.append(images)

    def compute(self):
        return float(sum(map(len, self.seen)))


@pytest.mark.parametrize(("n", "keep"), [(10, 3), (3, 10), (8, 8)])
def test_an_evaluation_measures_n_samples_and_keeps_the_first(n, keep):
    distance = CountingDistance()
    generator, options = drawer(), {"n": n, "seed": 0, "keep": keep}
    for _ in range(2):  # a second evaluation starts afresh
        row, kept = evaluate(generator, distance, **options)
        assert row["value"] == row["samples"] == n
    expected_row = {
        "metric": "fd_count", "sampler": "ddim", "sampler_steps": 5, "eta": 0.0, "features": "count", "feature_size": 4,
        "reference": "nothing",
    }  # fmt: skip
    assert row.items() >= expected_row.items()
    assert kept.shape == (keep, 4, 4, 3)
    expected = torch.cat(draw(max(n, keep)))
    assert (kept == expected[:keep].permute(0, 2, 3, 1).numpy()).all()
    assert torch.equal(torch.cat(distance.seen), expected[:n])
    row, kept = evaluate(generator, None, **options)
    assert "metric" not in row
    assert kept.shape == (keep, 4, 4, 3)

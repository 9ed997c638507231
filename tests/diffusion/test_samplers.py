import pytest
import torch

from fastdiff.diffusion import plan
from fastdiff.diffusion.plan import noise_like
from fastdiff.diffusion.samplers import PLANS, SAMPLERS, own_options
from fastdiff.errors import UserError
from fastdiff.evaluation.graph_loop import GraphLoop
from tests.diffusion.truths import ALL, gaussian_denoise, time

LINEAR = ALL["ddpm-linear"]
SHAPE = (2, 3, 4, 4)
DETERMINISTIC = ("ddim", "euler", "heun", "dpmpp-2m", "dpmpp-3m", "unipc", "flow-map")
# Every sampler, and its options that change the steps.
CASES = [(name, {}) for name in sorted(SAMPLERS)] + [
    ("ddpm", {"variance": "fixed-large"}), ("ddim", {"eta": 1.0}), ("euler", {"S_churn": 5.0}),
    ("heun", {"S_churn": 5.0, "S_tmin": 0.05, "S_tmax": 50.0, "S_noise": 1.003}), ("unipc", {"order": 1}),
    ("unipc", {"order": 2}), ("flow-map", {"gamma": 0.5}), ("predictor-corrector", {"corrector_steps": 2}),
]  # fmt: skip


def noise(schedule=LINEAR, dtype=torch.float64):
    return schedule.prior_std * torch.randn(SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(1))


def denoiser(schedule):
    """A smooth stand-in for a network, far from linear in x and in the time; refuses the clean end."""

    def denoise(x, t, *r):
        assert t.shape == ()
        assert t.dtype == torch.float64
        assert 0 < t <= schedule.t_max
        return 0.8 * torch.tanh(1.3 * x) + 0.1 * torch.cos(5 * t / schedule.t_max).to(x.dtype)

    return denoise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", sorted(ALL))
@pytest.mark.parametrize(("name", "options"), CASES)
def test_any_grid_works_on_any_schedule(name, options, schedule, dtype):
    schedule = ALL[schedule]
    for n in (1, 2, 3, 7):
        for clip in (False, True):
            generator = torch.Generator().manual_seed(2)
            x = SAMPLERS[name](
                denoiser(schedule), schedule, noise(schedule, dtype), schedule.grid(n), clip_x0=clip,
                generator=generator, **options,
            )  # fmt: skip
            assert x.dtype == dtype
            assert x.isfinite().all()
        if n == 1:  # one step returns the first estimate of x0
            x0 = denoiser(schedule)(noise(schedule, dtype), time(schedule.t_max)).clamp(-1, 1)
            torch.testing.assert_close(x, x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("end", [0.0, 0.5])
@pytest.mark.parametrize("schedule", ["cosine", "flow", "edm"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_step_is_a_static_function_of_its_row(name, options, schedule, end, n):
    """Copying each row into the same buffers, as a captured graph must, gives the same bits; so does the loop that
    sampling captures."""
    schedule = ALL[schedule]
    steps = PLANS[name](schedule, torch.linspace(schedule.t_max, end, n + 1, dtype=torch.float64), **options)
    denoise = denoiser(schedule)

    def eager(x, generator, on_step):
        return plan.run(steps, denoise, x, generator=generator, on_step=on_step)

    def static(x, generator, on_step):
        count = 0
        for rows in steps:
            times, table = rows.on(x)
            if len(table) == 0:
                continue
            buffers, t, row = tuple(v.clone() for v in rows.state(x)), times[0].clone(), table[0].clone()
            for i in range(len(table)):
                t.copy_(times[i])
                row.copy_(table[i])
                before = buffers[0].clone()
                new, x0 = rows.step(denoise, lambda like: noise_like(like, generator), t, row, buffers)
                for buffer, value in zip(buffers, new, strict=True):
                    assert (buffer.shape, buffer.dtype) == (value.shape, value.dtype)
                for buffer, value in zip(buffers, [value.clone() for value in new], strict=True):
                    buffer.copy_(value)
                on_step(count, before, x0)
                count += 1
            x = buffers[0].clone()
        return x

    def captured(x, generator, on_step):
        loop = GraphLoop(denoise, torch.device("cpu"))
        loop.generator.set_state(generator.get_state())
        return loop.run(steps, x, on_step=on_step)

    seen, results = [[], [], []], []
    for run, calls in zip((eager, static, captured), seen, strict=True):
        x_T, generator = noise(schedule), torch.Generator().manual_seed(5)
        results.append(run(x_T, generator, lambda i, x, x0, calls=calls: calls.append((i, x.clone(), x0.clone()))))
        assert torch.equal(x_T, noise(schedule))
    assert [i for i, _, _ in seen[0]] == list(range(n))
    assert torch.equal(seen[0][0][1], noise(schedule))
    for result, calls in zip(results[1:], seen[1:], strict=True):
        assert torch.equal(result, results[0])
        for (i, *ours), (j, *theirs) in zip(calls, seen[0], strict=True):
            assert i == j
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_guidance_moves_the_samples_to_where_it_points(name, options):
    """Guidance is a mix of denoisers: of those of two Gaussians of one width, that of a third, at the mixed mean."""
    weight, means = 1.5, (0.3, -0.2)
    one, other = (gaussian_denoise(LINEAR, mean) for mean in means)

    def guided(x, t, *r):
        return one(x, t) + weight * (one(x, t) - other(x, t))

    generator = torch.Generator().manual_seed(3)
    x_T = torch.randn(4000, 1, 1, 1, generator=generator, dtype=torch.float64)
    ends = [
        SAMPLERS[name](f, LINEAR, x_T, LINEAR.grid(50), generator=generator, **options).mean().item()
        for f in (one, guided)
    ]
    assert ends == pytest.approx([means[0], (1 + weight) * means[0] - weight * means[1]], abs=0.06)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_estimates_are_clipped_on_request(name):
    seen = []

    def denoise(x, t, *r):
        return 3.0 * torch.ones_like(x)

    for clip in (False, True):
        x = SAMPLERS[name](
            denoise, LINEAR, noise(), LINEAR.grid(4), clip_x0=clip, on_step=lambda i, x, x0: seen.append(x0)
        )
        assert float(x.max()) == pytest.approx(1.0 if clip else 3.0, abs=1e-12)
    assert [float(x0.max()) for x0 in seen] == [3.0] * 4 + [1.0] * 4


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("n", [1, 2, 9])
def test_evaluations_are_counted(name, n):
    calls = []

    def denoise(x, t, *r):
        calls.append(t)
        return denoiser(LINEAR)(x, t)

    SAMPLERS[name](denoise, LINEAR, noise(), LINEAR.grid(n))
    assert len(calls) == plan.evaluations(PLANS[name](LINEAR, LINEAR.grid(n)))


def test_the_network_is_asked_at_the_grid_s_times():
    for name in ("ddim", "dpmpp-3m", "unipc"):
        times = []
        SAMPLERS[name](lambda x, t, times=times: times.append(t.item()) or x, LINEAR, noise(), LINEAR.grid(5))
        assert times == LINEAR.grid(5)[:-1].tolist()


def test_samplers_have_the_options_of_their_plans_and_no_others():
    assert own_options("ddim") == {"eta": 0.0}
    assert set(own_options("heun")) == {"S_churn", "S_tmin", "S_tmax", "S_noise"}
    assert SAMPLERS["ddim"].__doc__.startswith("DDIM")
    with pytest.raises(TypeError, match="eta"):
        SAMPLERS["ddpm"](denoiser(LINEAR), LINEAR, noise(), LINEAR.grid(2), eta=1.0)


@pytest.mark.parametrize("name", sorted(DETERMINISTIC))
def test_deterministic_samplers_draw_nothing(name):
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    SAMPLERS[name](denoiser(LINEAR), LINEAR, noise(), LINEAR.grid(3), generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize(
    ("ts", "message"),
    [
        ([], "at least 2 times"),
        ([1000.0], "at least 2 times"),
        ([500.0, 600.0, 0.0], "descend"),
        ([500.0, 500.0, 0.0], "descend"),
        ([500.0, float("nan"), 0.0], "descend"),
        ([[2.0, 1.0]], "one dimension"),
        ([1.0, -1.0], "t >= 0"),
        ([1001.0, 0.0], "starts at t <= 1000"),
    ],
)
def test_bad_grids_are_named(name, ts, message):
    with pytest.raises(UserError, match=message):
        SAMPLERS[name](denoiser(LINEAR), LINEAR, noise(), torch.tensor(ts, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *[(name, {"eta": eta}, "eta is") for name in ("ddim", "euler-ancestral") for eta in (-0.1, 1.1, float("nan"))],
        ("ddpm", {"variance": "learned"}, "variance 'learned' is unknown"),
        *[("unipc", {"order": order}, "order is") for order in (0, 4, 1.5)],
        *[(name, {"S_churn": -1.0}, "S_churn is -1.0") for name in ("euler", "heun")],
        ("heun", {"S_noise": float("nan")}, "S_noise is nan"),
        *[("flow-map", {"gamma": gamma}, "gamma is") for gamma in (-0.1, 1.1, float("nan"))],
        *[("predictor-corrector", {"snr": snr}, "snr is") for snr in (0.0, -1.0, float("inf"), float("nan"))],
        *[("predictor-corrector", {"corrector_steps": m}, "corrector_steps is") for m in (0, 1.5)],
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        SAMPLERS[name](denoiser(LINEAR), LINEAR, noise(), LINEAR.grid(2), **options)

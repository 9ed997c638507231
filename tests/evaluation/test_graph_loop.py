"""Sampling through fixed buffers, as a CUDA graph replays it; on a CPU without the capture, or with a recorded one."""

import gc

import pytest
import torch

from fastdiff.diffusion.loops import eager_loop
from fastdiff.diffusion.objectives import make_objective
from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.evaluation import graph_loop
from fastdiff.evaluation.graph_loop import GraphLoop
from fastdiff.evaluation.sampling import SamplerSettings, half_weights, sample_batches
from fastdiff.nets.fuse import fuse
from fastdiff.nets.unet import UNet, UNetConfig
from fastdiff.training.ema import EMA
from fastdiff.training.graphs import WARMUP
from tests.recorded import captured, recorded_cuda

OBJECTIVE = make_objective("eps", schedule="ddpm-linear", timesteps=100, weighting="uniform")
NET = UNetConfig(image_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4)
STEPS = 7


@pytest.fixture
def deterministic():
    """cuDNN's fixed algorithms, so that two runs agree bit for bit."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def network(device="cpu", *, kernels="torch"):
    torch.manual_seed(0)
    net = UNet(NET).to(device).eval().requires_grad_(False)
    for p in net.parameters():
        p.add_(0.05 * torch.randn(p.shape).to(device))
    return fuse(net) if kernels == "triton" else net


def run(name, loop, *, generator, device="cpu", dtype=torch.float32, model=None, **options):
    """One batch from fixed noise by a closed-form denoiser or a network, and what on_step saw."""
    schedule, seen = OBJECTIVE.schedule, []

    def denoise(x_t, t):
        return OBJECTIVE.denoise(model, x_t, t) if model else torch.tanh(x_t) * schedule.alpha(t).to(x_t.dtype)

    x_T = torch.randn(2, 8, 8, 3, generator=generator, device=device, dtype=dtype).permute(0, 3, 1, 2)
    with torch.no_grad():
        x_0 = SAMPLERS[name](
            denoise, schedule, x_T, schedule.grid(STEPS), generator=generator, loop=loop,
            on_step=lambda i, x_t, x0_hat: seen.append((i, x_t.clone(), x0_hat.clone())), **options,
        )  # fmt: skip
    return x_0, seen


CASES = [*((name, {}) for name in SAMPLERS), ("ddim", {"eta": 1.0}), ("ddpm", {"clip_x0": True})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_fixed_buffers_give_the_eager_result_bit_for_bit_batch_after_batch(name, options):
    eager, fixed = (torch.Generator().manual_seed(5) for _ in range(2))
    loop, made = GraphLoop(), []
    for _ in range(3):
        expected, expected_seen = run(name, eager_loop, generator=eager, **options)
        x_0, seen = run(name, loop, generator=fixed, **options)
        assert torch.equal(x_0, expected)
        assert [i for i, *_ in seen] == [i for i, *_ in expected_seen]
        for (_, *mine), (_, *theirs) in zip(seen, expected_seen, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        made.append(len(loop.steps))
    assert made[0] == made[2] <= 3  # a body that is new in each batch would be captured in each batch


def test_members_of_the_state_may_change_places():
    """A multistep sampler moves old estimates on; buffers must not be overwritten before they are read."""

    def step(t, row, state):
        x, newer, older = state
        x0 = row[0] * x + older
        return (x0 + t[0].to(x.dtype), x, newer), x0

    generator = torch.Generator().manual_seed(0)
    state = tuple(torch.randn(3, 3, generator=generator) for _ in range(3))
    times, table = torch.rand(6, 1, dtype=torch.float64), torch.rand(6, 1)
    expected = eager_loop(step, state, times, table)
    got = GraphLoop()(step, state, times, table)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_result_is_not_overwritten_by_the_next_batch_nor_the_input_by_the_loop():
    def step(t, row, state):
        return (row[0] * state[0],), state[0]

    loop, x = GraphLoop(), torch.ones(2)
    times, table = torch.zeros(2, 1, dtype=torch.float64), torch.full((2, 1), 2.0)
    (first,) = loop(step, (x,), times, table)
    loop(step, (3 * x,), times, table)
    assert first.tolist() == [4.0, 4.0]
    assert x.tolist() == [1.0, 1.0]


def test_another_constant_shape_or_generator_is_another_step():
    def make(scale):
        return lambda t, row, state: ((scale * state[0],), state[0])

    loop, results = GraphLoop(), []
    times, table = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1)
    for scale, n, generator in ((2.0, 1, None), (3.0, 1, None), (2.0, 2, None), (2.0, 1, torch.Generator())):
        (x,) = loop(make(scale), (torch.ones(n),), times, table, generator=generator)
        results.append(x.sum().item())
    assert results == [2.0, 3.0, 4.0, 2.0]
    assert len(loop.steps) == 4
    loop(make(2.0), (torch.ones(1),), times, table)
    assert len(loop.steps) == 4


def test_a_step_that_closes_over_a_tensor_is_refused():
    hidden = torch.ones(1)
    with pytest.raises(ValueError, match="closes over the tensor hidden"):
        GraphLoop()(
            lambda t, row, state: ((hidden * state[0],), state[0]), (torch.ones(1),),
            torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1),
        )  # fmt: skip


def draw(model, n, *, device="cpu", bf16=False, batch_size=4, **options):
    return torch.cat(
        list(
            sample_batches(
                model, OBJECTIVE, n, settings=SamplerSettings("ddim", STEPS, 0.5), image_shape=(3, 8, 8),
                batch_size=batch_size, seed=1, device=torch.device(device), bf16=bf16, **options,
            )
        )
    )  # fmt: skip


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_images_are_the_same_with_and_without_graphs(kernels):
    net = network(kernels=kernels)
    assert torch.equal(draw(net, 10), draw(net, 10, graphs=False))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_kept_loop_follows_weights_that_change_in_place(deterministic, device):
    """As a run's evaluations use it: new averages are copied into the network that samples are drawn from."""
    ema = EMA(network(device), 0.5)
    net, loop = half_weights(ema.model), GraphLoop()
    options = {"device": device, "bf16": True}
    first, made = draw(net, 10, loop=loop, **options), dict(loop.steps)
    places = [p.data_ptr() for p in net.parameters()]
    for p in ema.model.parameters():
        p.mul_(1.1)
    ema.copy_to(net)
    assert [p.data_ptr() for p in net.parameters()] == places
    again = draw(net, 10, loop=loop, **options)
    assert loop.steps == made
    assert not torch.equal(again, first)
    assert torch.equal(again, draw(net, 10, graphs=False, **options))


def test_progress_counts_images_up_to_the_last():
    shown = []
    draw(lambda x, t: 0.5 * x, 10, progress=shown.append)
    assert len(shown) == 3 * STEPS
    assert shown == sorted(shown)
    assert shown[STEPS - 1] == 4
    assert shown[-1] == 10


def test_half_weights_compute_what_autocast_would():
    net = network()
    half = half_weights(net)
    x, t = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), torch.tensor([3.0, 70.0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half(x, t), net(x, t))
    assert half.conv_in.weight.dtype == torch.bfloat16
    assert half.norm_out.weight.dtype == net.conv_in.weight.dtype == torch.float32
    assert half.conv_in.weight.stride() == net.conv_in.weight.stride()
    assert torch.equal(draw(half, 4, bf16=True), draw(net, 4, bf16=True))


# Captured and replayed, on a CPU: see tests/recorded.py


@pytest.fixture
def replaying(monkeypatch):
    """Steps are captured on a CPU too."""
    recorded_cuda(monkeypatch)
    monkeypatch.setattr(graph_loop, "Captured", captured)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_replayed_sampling_is_the_eager_one_bit_for_bit(replaying, name, options):
    net = network(kernels="triton")
    eager, replayed = (torch.Generator().manual_seed(5) for _ in range(2))
    loop = GraphLoop()
    for _ in range(WARMUP + 2):  # so that a body of one row is captured too
        expected, expected_seen = run(name, eager_loop, generator=eager, model=net, **options)
        x_0, seen = run(name, loop, generator=replayed, model=net, **options)
        assert torch.equal(x_0, expected)
        assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(seen, expected_seen, strict=True))
    assert all(step.call.graph.replays >= 2 for step in loop.steps.values())


def test_a_replay_follows_weights_that_change_in_place(replaying):
    net, loop = half_weights(network(kernels="triton")), GraphLoop()
    first = draw(net, 10, bf16=True, loop=loop)
    for p in net.parameters():
        p.mul_(1.1)
    again = draw(net, 10, bf16=True, loop=loop)
    assert not torch.equal(again, first)
    assert torch.equal(again, draw(net, 10, bf16=True, graphs=False))
    assert all(step.call.graph.replays > STEPS for step in loop.steps.values())


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "options"), CASES)
def test_captured_sampling_is_the_uncaptured_one_bit_for_bit(deterministic, name, options):
    net = network("cuda", kernels="triton")
    eager, captured = (torch.Generator("cuda").manual_seed(5) for _ in range(2))
    loop = GraphLoop()
    for _ in range(WARMUP + 2):  # so that a body of one row is captured too
        expected, _ = run(name, eager_loop, generator=eager, device="cuda", model=net, **options)
        x_0, _ = run(name, loop, generator=captured, device="cuda", model=net, **options)
        assert torch.equal(x_0, expected)
    assert all(step.call.graph is not None for step in loop.steps.values())


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_captured_bf16_network_draws_the_same_images(deterministic, compile):
    net = half_weights(network("cuda", kernels="triton"))
    model = torch.compile(net) if compile else net
    options = {"device": "cuda", "bf16": True, "batch_size": 16}
    assert torch.equal(draw(model, 40, **options), draw(model, 40, **options, graphs=False))


@pytest.mark.gpu
def test_captured_sampling_needs_no_more_memory_for_more_images():
    net, peaks = half_weights(network("cuda", kernels="triton")), []
    for n in (64, 512):
        gc.collect()  # the graphs of the draws before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in sample_batches(
            net, OBJECTIVE, n, settings=SamplerSettings("ddim", STEPS), image_shape=(3, 8, 8), batch_size=32, seed=1,
            device=torch.device("cuda"), bf16=True,
        ):  # fmt: skip
            pass
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= peaks[0] + 2**20

"""Sampling through fixed buffers, as a CUDA graph replays it; on a CPU without the capture, or with a recorded one."""

import gc
from dataclasses import replace
from functools import partial

import pytest
import torch

from fastdiff.config import Config
from fastdiff.diffusion import plan
from fastdiff.diffusion.objectives import make_objective
from fastdiff.diffusion.plan import Rows
from fastdiff.diffusion.samplers import PLANS, clipping
from fastdiff.evaluation import graph_loop
from fastdiff.evaluation.generate import Generator, SamplerSettings, half_weights
from fastdiff.evaluation.graph_loop import GraphLoop
from fastdiff.model_sections import Guidance
from fastdiff.nets.fuse import fuse
from fastdiff.nets.text import byte_ids
from fastdiff.nets.unet import UNet, UNetConfig
from fastdiff.runtime.graphs import WARMUP
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


@pytest.fixture
def replaying(monkeypatch):
    """Steps are captured on a CPU too, see tests/recorded.py."""
    recorded_cuda(monkeypatch)
    monkeypatch.setattr(graph_loop, "Captured", captured)


def network(device="cpu", *, kernels="torch"):
    torch.manual_seed(0)
    net = UNet(NET).to(device).eval().requires_grad_(False)
    for p in net.parameters():
        p.add_(0.05 * torch.randn(p.shape).to(device))
    return fuse(net) if kernels == "triton" else net


def denoise(x_t, t, *r):
    """A closed form."""
    return torch.tanh(x_t) * OBJECTIVE.schedule.alpha(t).to(x_t.dtype)


def denoiser(net):
    return lambda x_t, *t: OBJECTIVE.denoise(net, x_t, *t)


def make(name, **options):
    """A plan, and noise for it by a generator."""
    schedule = OBJECTIVE.schedule
    clip = options.pop("clip_x0", False)
    return PLANS[name](schedule, schedule.grid(STEPS), **options), clip


def compare(name, options, loop, eager, *, fn=denoise, batches=3):
    """The loop's results and what on_step sees, beside the eager ones, batch after batch; -> kinds of steps after each.

    Both draw from generators of one seed, first the noise that they start from.
    """
    steps, clip = make(name, **options)
    fn = clipping(fn) if clip else fn
    made = []
    for _ in range(batches):
        results = []
        for generator in (eager, loop.generator):
            seen = []

            def note(i, x_t, x0, seen=seen):
                seen.append((i, x_t.clone(), x0.clone()))

            x_T = torch.randn(2, 8, 8, 3, generator=generator, device=loop.device).permute(0, 3, 1, 2)
            with torch.no_grad():
                if generator is eager:
                    x_0 = plan.run(steps, fn, x_T, generator=generator, on_step=note)
                else:
                    x_0 = loop.run(steps, x_T, on_step=note)
            results.append((x_0, seen))
        (expected, theirs), (x_0, mine) = results
        assert torch.equal(x_0, expected)
        assert [i for i, *_ in mine] == [i for i, *_ in theirs]
        for (_, *ours), (_, *others) in zip(mine, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
        made.append(len(loop.steps))
    return made


def looped(name, options, fn=denoise, device="cpu"):
    """A loop for the case, and a generator for the eager run beside it."""
    loop = GraphLoop(clipping(fn) if options.get("clip_x0") else fn, torch.device(device))
    loop.generator.manual_seed(5)
    return loop, torch.Generator(device).manual_seed(5)


CASES = [*((name, {}) for name in PLANS), ("ddim", {"eta": 1.0}), ("ddpm", {"clip_x0": True})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_fixed_buffers_give_the_eager_result_bit_for_bit_batch_after_batch(name, options):
    made = compare(name, options, *looped(name, options))
    assert made[0] == made[2] <= 3  # a step that is new in each batch would be captured in each batch


def rows(step, n, memory=0, value=2.0):
    return [Rows(step, torch.zeros(n, 1, dtype=torch.float64), torch.full((n, 1), value, dtype=torch.float64), memory)]


def test_members_of_the_state_may_change_places():
    """A multistep sampler moves old estimates on; buffers must not be overwritten before they are read."""

    def step(denoise, noise, t, row, state):
        x, newer, older = state
        x0 = row[0] * x + older + 1
        return (x0, x, newer), x0

    steps, x = rows(step, 6, memory=2), torch.randn(3, 3)
    assert torch.equal(GraphLoop(denoise, torch.device("cpu")).run(steps, x), plan.run(steps, denoise, x))


def double(denoise, noise, t, row, state):
    return (row[0] * state[0],), state[0]


def test_the_result_is_not_overwritten_by_the_next_batch_nor_the_input_by_the_loop():
    loop, x = GraphLoop(denoise, torch.device("cpu")), torch.ones(2)
    first = loop.run(rows(double, 2), x)
    loop.run(rows(double, 2), 3 * x)
    assert first.tolist() == [4.0, 4.0]
    assert x.tolist() == [1.0, 1.0]


def test_another_step_or_shape_is_captured_anew_and_other_numbers_are_not():
    def once(denoise, noise, t, row, state):
        return state, state[0]

    loop = GraphLoop(denoise, torch.device("cpu"))
    for step, n, value, result, kinds in (
        (double, 1, 2.0, 2.0, 1), (once, 1, 2.0, 1.0, 2), (double, 2, 2.0, 4.0, 3), (double, 1, 3.0, 3.0, 3),
    ):  # fmt: skip
        assert loop.run(rows(step, 1, value=value), torch.ones(n)).sum() == result
        assert len(loop.steps) == kinds


def labelled(x_t, t, *, labels):
    return torch.tanh(x_t) * labels.to(x_t.dtype)[:, None, None, None]


@pytest.mark.parametrize("name", ["ddim", "heun", "unipc"])
def test_each_call_sees_its_own_conditions(replaying, name):
    """A replayed step reads the labels of this call, whatever those of the call that was captured were."""
    steps, _ = make(name)
    loop, x = GraphLoop(labelled, torch.device("cpu")), torch.randn(2, 3, 8, 8)
    for labels in ([1, 2], [7, 8], [1, 2]) * (WARMUP + 1):
        labels = torch.tensor(labels)
        got = loop.run(steps, x, conditions={"labels": labels})
        assert torch.equal(got, plan.run(steps, partial(labelled, labels=labels), x))
    assert all(step.call.graph.replays >= 2 for step in loop.steps.values())


def drawer(net, *, device="cpu", bf16=False, batch_size=4, **options):
    return Generator(
        net, OBJECTIVE, SamplerSettings("ddim", STEPS, 0.5), shape=(3, 8, 8), batch_size=batch_size,
        device=torch.device(device), bf16=bf16, **options,
    )  # fmt: skip


def draw(generator, n):
    return torch.cat(list(generator.batches(n, seed=1)))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_images_are_the_same_with_and_without_graphs(kernels):
    net = network(kernels=kernels)
    assert torch.equal(draw(drawer(net), 10), draw(drawer(net, graphs=False), 10))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("device", ["cpu", "replayed", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_generator_follows_weights_that_change_in_place(deterministic, request, device, bf16, kernels):
    """As a run's evaluations use it: the averages change from one to the next."""
    if device == "replayed":
        request.getfixturevalue("replaying")
    device = "cuda" if device == "cuda" else "cpu"
    net = network(device, kernels=kernels)
    images = drawer(net, device=device, bf16=bf16)
    first, made = draw(images, 10), dict(images.loop.steps)
    for p in net.parameters():
        p.mul_(1.1)
    again = draw(images, 10)
    assert images.loop.steps == made
    assert not torch.equal(again, first)
    assert torch.equal(again, draw(drawer(net, device=device, bf16=bf16, graphs=False), 10))


TEXTS = [["a cat", "a dog", "", "two"], ["", "a mouse", "two", "a cat"]]


@pytest.mark.parametrize(
    ("kind", "schedule", "told"),
    [("eps", "ddpm-linear", "labels"), ("edm", "cosine", "text"), ("edm", "auto", "labels"), ("flow", "auto", "text")],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_replayed_guided_step_sees_each_calls_conditions_scale_and_weights(
    deterministic, request, device, kind, schedule, told
):
    if device == "cpu":
        request.getfixturevalue("replaying")
    net = replace(NET, num_classes=3) if told == "labels" else replace(NET, text_encoder="bytes", text_width=8)
    torch.manual_seed(0)
    network = UNet(net).eval().requires_grad_(False)
    for p in network.parameters():
        p.add_(0.2 * torch.randn(p.shape))
    network.to(device)
    objective = make_objective(**Config.of(objective=kind, schedule=schedule).diffusion.arguments)

    def generator(graphs):
        nothing = {"labels": torch.tensor(3)} if told == "labels" else {"text": byte_ids([""], 9)[0]}
        return Generator(
            fuse(network), objective, SamplerSettings("ddim", STEPS), shape=(3, 8, 8), batch_size=4, bf16=True,
            device=torch.device(device), nothing=nothing, graphs=graphs,
        )  # fmt: skip

    replayed, seen = generator(True), []
    for i, guidance in enumerate([Guidance(3.0), Guidance(1.5, (0.2, 5.0))] * 2):
        asked = {"labels": torch.tensor([i % 2, 2, 1, 0])} if told == "labels" else {"text": byte_ids(TEXTS[i % 2], 9)}
        images, plain = (
            next(made.batches(4, seed=1, conditions=asked, guidance=guidance)) for made in (replayed, generator(False))
        )
        assert torch.equal(images, plain)
        assert all(not torch.equal(images, before) for before in seen)
        seen.append(images)
        for p in network.parameters():
            p.mul_(1.02)
    (step,) = replayed.loop.steps.values()
    assert step.call.graph is not None
    assert device == "cuda" or step.call.graph.replays == 4 * STEPS - WARMUP


def test_progress_counts_images_up_to_the_last():
    shown = []
    list(drawer(lambda x, t: 0.5 * x).batches(10, seed=1, progress=shown.append))
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


@pytest.mark.parametrize(("name", "options"), CASES)
def test_replayed_sampling_is_the_eager_one_bit_for_bit(replaying, name, options):
    fn = denoiser(network(kernels="triton"))
    loop, eager = looped(name, options, fn)
    compare(name, options, loop, eager, fn=fn, batches=WARMUP + 2)  # so that a plan of one row is captured too
    assert all(step.call.graph.replays >= 2 for step in loop.steps.values())


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "options"), CASES)
def test_captured_sampling_is_the_uncaptured_one_bit_for_bit(deterministic, name, options):
    fn = denoiser(network("cuda", kernels="triton"))
    loop, eager = looped(name, options, fn, "cuda")
    compare(name, options, loop, eager, fn=fn, batches=WARMUP + 2)
    assert all(step.call.graph is not None for step in loop.steps.values())


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_captured_bf16_network_draws_the_same_images(deterministic, compile):
    net = network("cuda", kernels="triton")
    options = {"device": "cuda", "bf16": True, "batch_size": 16, "compile": compile}
    assert torch.equal(draw(drawer(net, **options), 40), draw(drawer(net, **options, graphs=False), 40))


@pytest.mark.gpu
def test_captured_sampling_needs_no_more_memory_for_more_images():
    net, peaks = network("cuda", kernels="triton"), []
    for n in (64, 512):
        gc.collect()  # the graphs of the draws before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in drawer(net, device="cuda", bf16=True, batch_size=32).batches(n, seed=1):
            pass
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= peaks[0] + 2**20

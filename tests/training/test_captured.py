"""Captures and replays of the step, recorded on a CPU: see tests/recorded.py."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from fastdiff.diffusion.reconstruction import Reconstruction
from fastdiff.errors import UserError
from fastdiff.evaluation.space import Latents
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.nets.autoencoder import Autoencoder
from fastdiff.nets.text import byte_ids
from fastdiff.runtime import graphs as graphs_module
from fastdiff.runtime.graphs import WARMUP, Captured, CapturedFunction
from fastdiff.runtime.world import Ranks
from fastdiff.training import step as step_module
from fastdiff.training.conditions import CaptionTable
from tests.recorded import captured, recorded_cuda
from tests.runtime.test_graphs import assert_same_state
from tests.training.test_step import SMALL, batch, consistency, curve, flow_map, make_step


@pytest.fixture
def cuda(monkeypatch):
    return recorded_cuda(monkeypatch)


def test_every_call_does_the_work_once_first_as_it_is_then_as_a_replay(cuda):
    streams, main, count = [], cuda.now, torch.zeros(())

    def body():
        streams.append(cuda.now)
        count.add_(1)

    generator = torch.Generator()
    call = Captured(body, device=torch.device("cpu"), capture=True, what="the step", generators=[generator])
    ready = []
    for i in range(WARMUP + 3):
        ready.append(call.ready)
        call()
        assert count == i + 1
    assert streams == [call.stream] * (WARMUP + 1)  # the last of them to be captured
    assert call.stream is not main
    assert main.waits == [call.stream] * WARMUP
    assert call.stream.waits == [main] * WARMUP
    assert ready == [False] * (WARMUP + 1) + [True] * 2
    (graph,) = cuda.made
    assert graph.generators == [generator]
    assert graph.replays == 3


def test_work_that_cannot_be_captured_is_refused_by_the_flags_name(cuda):
    def body():
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    call = Captured(body, device=torch.device("cpu"), capture=True, what="the training step")
    for _ in range(WARMUP):
        call()
    with pytest.raises(
        UserError, match=r"the training step cannot be captured .*\(operation not .*\); use --no-graphs"
    ):
        call()


@pytest.mark.parametrize(
    ("cause", "raised", "said"),
    [
        (ValueError("the real reason\nand more"), UserError, r"\(the real reason\); use --no-graphs"),
        (AssertionError(), UserError, r"\(AssertionError\); use --no-graphs"),
        (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError, "^out of memory$"),
    ],
)
def test_the_bodys_own_error_is_told_not_that_of_the_captures_end(cuda, cause, raised, said):
    def body():
        if cuda.capturing:
            raise cause

    call = Captured(body, device=torch.device("cpu"), capture=True, what="the training step")
    for _ in range(WARMUP):
        call()
    with pytest.raises(raised, match=said):
        call()


@pytest.fixture
def captured_step(cuda, monkeypatch):
    """Makes a step that is captured, with our update: PyTorch's reads the host's numbers on a CPU."""

    def make(**options):
        with monkeypatch.context() as patch:
            patch.setattr(step_module, "Captured", captured)
            return make_step(kernels="triton", graphs=True, **options)

    return make


@pytest.mark.parametrize(("bf16", "accumulate"), [(False, 1), (True, 1), (True, 4)])
def test_a_replayed_step_is_the_plain_one_bit_for_bit(captured_step, bf16, accumulate):
    """Learning rate (which rises), decay, batch, seeds: nothing of a step is that of the capture."""
    options = {"bf16": bf16, "accumulate": accumulate}
    plain, replayed = make_step(kernels="triton", graphs=True, **options), captured_step(**options)
    assert curve(replayed, 12) == curve(plain, 12)
    assert replayed.run.graph.replays == 12 - WARMUP
    assert_same_state(replayed, plain)


def test_a_step_is_captured_anew_in_another_precision(cuda, monkeypatch):
    plain, replayed = (make_step(kernels="triton", graphs=True) for _ in range(2))
    losses = []
    for train_step in (plain, replayed):
        if train_step is replayed:
            monkeypatch.setattr(step_module, "Captured", captured)
        curves = []
        for i, precision in enumerate(("bf16", "tf32", "fp32")):
            train_step.compute_in(precision)
            curves += curve(train_step, 6, start=6 * i)
        losses.append(curves)
    assert losses[0] == losses[1]
    assert replayed.run.graph.replays == 6 - WARMUP
    assert losses[0][:6] != curve(make_step(kernels="triton", graphs=True), 6)  # which is in float32
    assert_same_state(replayed, plain)


@pytest.mark.parametrize(
    ("make_objective", "net", "stage"),
    [
        (partial(consistency, teacher=lambda x_t, t: 0.9 * x_t, heun=True, teacher_steps=2), SMALL, 0.125),
        (flow_map, replace(SMALL, two_times=True), 2.0 ** -(11 / 3)),
    ],
)
def test_a_replayed_step_sees_each_stage_of_few_steps(captured_step, make_objective, net, stage):
    plain, replayed = (
        make(objective=make_objective(), net=net)
        for make in (partial(make_step, kernels="triton", graphs=True), captured_step)
    )
    assert curve(replayed, 12) == curve(plain, 12)
    assert replayed.run.graph.replays == 12 - WARMUP
    assert replayed.objective.stage == plain.objective.stage == pytest.approx(stage)
    assert_same_state(replayed, plain)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_replayed_step_reads_each_batchs_captions(captured_step, bf16):
    captions = tuple((f"a {colour} {thing}", thing) for colour in ("red", "blue") for thing in "abcdefgh")
    table = CaptionTable(captions, lambda texts: {"text": byte_ids(texts, 10)}, dropout=0.2, device=torch.device("cpu"))
    options = {
        "net": replace(SMALL, text_encoder="bytes", text_width=8, text_blocks=1), "bf16": bf16, "conditions": [table],
    }  # fmt: skip
    plain, replayed = make_step(kernels="triton", graphs=True, **options), captured_step(**options)
    assert curve(replayed, 9) == curve(plain, 9)
    assert_same_state(replayed, plain)
    half = {name for name, weight in replayed.update.weights.items() if weight.dtype == torch.bfloat16}
    assert ("text.blocks.0.qkv.weight" in half) == bf16
    assert not {"text.byte.weight", "text.position.weight", "text.norm.weight"} & half


AUTOENCODER = AutoencoderConfig(factor=2, base_channels=8, blocks=1)


def test_a_replayed_step_of_an_autoencoder_is_the_plain_one(captured_step):
    plain, replayed = (
        make(
            net=AUTOENCODER,
            objective=Reconstruction("l1", kl_weight=1e-3, equivariance=True, latent_shape=(4, 4, 4)),
        )
        for make in (partial(make_step, kernels="triton", graphs=True), captured_step)
    )
    assert curve(replayed, 9) == curve(plain, 9)
    assert replayed.run.graph.replays == 9 - WARMUP
    assert_same_state(replayed, plain)


def test_a_replayed_step_draws_its_latents(captured_step):
    def moments(step, device="cpu"):
        return batch(step).repeat(1, 1, 1, 3)[:, ::2, ::2, :8].half() / 64 - 2

    space = Latents(Autoencoder(AUTOENCODER))
    net = replace(SMALL, image_size=4, image_channels=4)
    plain, replayed = (
        make(net=net, space=space) for make in (partial(make_step, kernels="triton", graphs=True), captured_step)
    )
    losses = curve(plain, 9, batch=moments)
    assert curve(replayed, 9, batch=moments) == losses
    assert_same_state(replayed, plain)
    sure = curve(
        make_step(net=net, space=space, kernels="triton", graphs=True), 9,
        batch=lambda step, device: moments(step).index_fill(3, torch.arange(4, 8), -60.0),
    )  # fmt: skip
    assert sure != losses  # without a variance


def test_a_captured_function_gives_results_of_its_own(cuda, monkeypatch):
    monkeypatch.setattr(graphs_module, "Captured", captured)
    calls = []

    def function(x):
        calls.append(x.shape)
        return 2 * x + 1

    call = CapturedFunction(function, device=torch.device("cpu"), capture=True, what="the decoder")
    inputs = [torch.full((n, 2), float(i)) for i in range(WARMUP + 3) for n in (1, 3)]
    results = [call(x) for x in inputs]
    for x, y in zip(inputs, results, strict=True):
        assert torch.equal(y, 2 * x + 1)
    assert len(cuda.made) == 2
    assert calls.count((1, 2)) == WARMUP + 1


def test_a_captured_function_knows_whether_autocast_is_on(cuda, monkeypatch):
    """A graph of one would give the other's rounding."""
    monkeypatch.setattr(graphs_module, "Captured", captured)
    weight = torch.randn(4, 4)
    call = CapturedFunction(lambda x: x @ weight, device=torch.device("cpu"), capture=True, what="the decoder")
    for _ in range(WARMUP + 2):
        for bf16 in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                assert call(torch.eye(4)).dtype == (torch.bfloat16 if bf16 else torch.float32)


def test_the_critic_learns_the_same_whatever_its_weight_in_the_decoders_loss():
    steps = [
        make_step(
            net=replace(AUTOENCODER, critic_weight=weight), grad_clip=1e9,
            objective=Reconstruction(
                "l1", kl_weight=1e-3, equivariance=True, latent_shape=(4, 4, 4), critic_weight=weight
            ),
        )
        for weight in (0.1, 5.0)
    ]  # fmt: skip
    for step in steps:
        curve(step, 1)
    one, other = (step.model.state_dict() for step in steps)
    assert all(torch.equal(one[name], other[name]) for name in one if name.startswith("critic."))
    last = "decoder.conv_out.weight"  # which alone learns in the first step, as it is zero
    assert not torch.equal(one[last], other[last])


def test_the_critic_computes_in_float32_beside_bf16(monkeypatch):
    step = make_step(
        net=replace(AUTOENCODER, critic_weight=0.1), bf16=True,
        objective=Reconstruction("l1", kl_weight=1e-3, equivariance=True, latent_shape=(4, 4, 4), critic_weight=0.1),
    )  # fmt: skip
    seen = []
    step.critic.register_forward_hook(lambda module, inputs, y: seen.append((inputs[0].dtype, y.dtype)))
    curve(step, 1)
    assert seen == [(torch.float32, torch.float32)] * 4


def test_a_replayed_step_goes_on_from_a_loaded_state(captured_step):
    train_step = captured_step(bf16=True)
    curve(train_step, 8)
    saved = copy.deepcopy(
        (train_step.model.state_dict(), train_step.update.ema.state_dict(), train_step.update.state_dict())
    )
    expected = curve(train_step, 6, start=8)
    for each in (train_step, captured_step(bf16=True)):  # one that has its graph already, and one that has not
        each.model.load_state_dict(saved[0])
        each.update.ema.load_state_dict(saved[1], updates=8)
        each.update.load_state_dict(copy.deepcopy(saved[2]))
        assert curve(each, 6, start=8) == expected


def test_a_replayed_step_passes_over_what_is_not_finite(captured_step):
    plain, replayed = make_step(kernels="triton", graphs=True), captured_step()
    for train_step in (plain, replayed):
        for step in range(9):
            weight = train_step.parameters[0]
            good = weight.detach().clone()
            if step in (6, 8):
                weight.data.fill_(torch.nan)
            train_step(batch(step), step)
            if step in (6, 8):
                weight.data.copy_(good)
    assert replayed.metrics.state_dict() == plain.metrics.state_dict()
    assert plain.metrics.state_dict()["skipped"] == 2
    assert plain.metrics.state_dict()["bad_step"] == 6
    assert_same_state(replayed, plain)


def test_the_second_rank_replays_the_noise_of_the_first(captured_step):
    """Its own generator draws it, which the graph has to know."""
    ranks = Ranks(torch.device("cpu"), rank=1, size=2)
    ranks.sum_ = lambda tensors, what=None: None
    plain = make_step(kernels="triton", graphs=True, ranks=ranks)
    assert curve(captured_step(ranks=ranks), 8) == curve(plain, 8)


def test_what_a_replay_does_not_do(cuda):
    """It follows no number of the host; and nothing may be read from memory that the body allocated."""
    total, numbers, left = torch.zeros(()), iter(range(10)), []

    def body():
        total.add_(next(numbers))
        left.append(total + 1)

    call = Captured(body, device=total.device, capture=True, what="the step")
    for _ in range(WARMUP + 3):
        call()
    assert total == sum(range(WARMUP)) + 3 * WARMUP
    assert left[-1].isnan()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda x, generator: x.add_(x.item()), "not permitted"),
        (lambda x, generator: x[x > 0].sum(), "not permitted"),
        (lambda x, generator: x.masked_fill_(x.nonzero().any(), 1.0), "not permitted"),
        (lambda x, generator: torch.equal(x, x), "not permitted"),
        (lambda x, generator: x.normal_(generator=generator), "not registered"),
    ],
)
def test_what_a_capture_refuses(cuda, body, reason):
    x, generator = torch.zeros(()), torch.Generator()
    call = Captured(lambda: body(x, generator), device=x.device, capture=True, what="the step")
    for _ in range(WARMUP):
        call()
    with pytest.raises(UserError, match=reason):
        call()

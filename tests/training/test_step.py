import copy
import dataclasses
from functools import partial

import pytest
import torch

from fastdiff.data.pixels import normalize
from fastdiff.diffusion.consistency import Consistency
from fastdiff.diffusion.flow_map import FlowMap
from fastdiff.diffusion.objectives import make_objective
from fastdiff.evaluation.space import PIXELS
from fastdiff.few_step_section import TuningConfig
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.nets.autoencoder import Autoencoder
from fastdiff.nets.fuse import fuse, half_parameters
from fastdiff.nets.unet import UNet, UNetConfig
from fastdiff.training import step as step_module
from fastdiff.training.ema import EMA
from fastdiff.training.optim import LearningRate, make_update
from fastdiff.training.step import TrainStep, step_seed

SMALL = UNetConfig(
    image_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4, dropout=0.1
)


def make_step(
    device="cpu", *, net=SMALL, kernels="torch", bf16=False, compile=False, grad_clip=1.0, seed=0, accumulate=1,
    graphs=False, ranks=None, wrap=lambda model: model, objective=None, space=PIXELS, conditions=(),
):  # fmt: skip
    torch.manual_seed(0)
    kind = Autoencoder if isinstance(net, AutoencoderConfig) else UNet
    model = wrap(kind(net).to(device))
    network = fuse(model) if kernels == "triton" else model
    objective = objective or make_objective("eps", schedule="ddpm-linear", timesteps=1000, weighting="uniform")
    update = make_update(
        kernels, model, EMA(model, 0.99), weight_decay=0.0, half=half_parameters(network) if bf16 else (),
        accumulate=accumulate > 1 or ranks is not None, graphs=graphs,
    )  # fmt: skip
    return TrainStep(
        network, objective, update, lr=LearningRate(1e-3, 5), grad_clip=grad_clip, seed=seed,
        bf16=bf16, compile=compile, accumulate=accumulate, graphs=graphs, ranks=ranks, space=space,
        critic=getattr(model, "critic", None), conditions=conditions,
    )  # fmt: skip


def batch(step, device="cpu", n=16):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (n, 8, 8, 3), dtype=torch.uint8, generator=generator).to(device)


def curve(train_step, steps, device="cpu", start=0, batch=batch):
    losses = []
    for step in range(start, start + steps):
        images = batch(step, device)
        train_step(images, step, torch.arange(len(images), device=device))
        losses.append(train_step.metrics.means()["loss"])
    return losses


def test_normalize_spans_minus_one_to_one_in_channels_last():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3).contiguous()
    x = normalize(images)
    assert (x.min(), x.max(), x.dtype, x.shape) == (-1.0, 1.0, torch.float32, (2, 3, 16, 16))
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_a_step_is_the_textbook_update():
    train_step = make_step()
    model, objective = train_step.model, train_step.objective
    twin = UNet(SMALL)
    twin.load_state_dict(model.state_dict())
    adam = torch.optim.Adam(twin.parameters(), lr=1e-3)
    for step in range(3):
        images = batch(step)
        train_step(images, step)
        torch.manual_seed(step_seed(0, step))
        t = torch.randint(1, 1001, (16,))
        eps = torch.randn(16, 8, 8, 3).permute(0, 3, 1, 2)
        a, s = (f(t)[:, None, None, None] for f in (objective.schedule.alpha, objective.schedule.sigma))
        loss = (twin(a * (images.permute(0, 3, 1, 2) / 127.5 - 1) + s * eps, t - 1) - eps).square().mean()
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        adam.param_groups[0]["lr"] = 1e-3 * (step + 1) / 5
        adam.step()
        metrics = train_step.metrics.means()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_randomness_depends_on_seed_step_and_rank_alone():
    assert curve(make_step(), 3) == curve(make_step(), 3)
    torch.manual_seed(123)
    first = make_step()
    torch.randn(100)
    assert curve(first, 3) == curve(make_step(), 3)
    assert curve(make_step(seed=1), 3) != curve(make_step(), 3)
    seeds = {step_seed(seed, step, rank) for seed in range(20) for step in range(20) for rank in range(20)}
    assert len(seeds) == 20**3
    assert all(0 <= s < 2**63 for s in seeds)


def test_metrics_are_means_since_the_last_read_and_continue_from_a_saved_state():
    each = curve(make_step(), 4)
    train_step = make_step()
    for step in range(4):
        train_step(batch(step), step)
        if step == 1:
            saved = train_step.metrics.state_dict()
            train_step.metrics.load_state_dict(saved)
    assert train_step.metrics.means()["loss"] == pytest.approx(sum(each) / 4, rel=1e-6)


def test_the_first_step_that_is_not_finite_is_remembered():
    train_step = make_step()
    for step in range(5):
        if step == 2:
            with torch.no_grad():
                train_step.parameters[0].fill_(float("nan"))
        train_step(batch(step), step)
        assert train_step.metrics.state_dict()["bad_step"] == (2 if step >= 2 else -1)


def test_gradients_are_clipped():
    free, clipped = make_step(grad_clip=1e9), make_step(grad_clip=1e-3)
    seen = {}
    for name, train_step in (("free", free), ("clipped", clipped)):
        step = train_step.update.adam.step

        def spy(train_step=train_step, name=name, step=step):
            seen[name] = torch.cat([p.grad.flatten() for p in train_step.parameters]).norm().item()
            step()

        train_step.update.adam.step = spy
        train_step(batch(0), 0)
    assert seen["free"] > 1e-2
    assert seen["clipped"] == pytest.approx(1e-3, rel=1e-3)


def consistency(**options):
    """Stages of 48 images, 3 steps of `batch`."""
    tuning = TuningConfig(few_step="consistency", q=2.0, stages=3, stage_images=48)
    return Consistency(make_objective("edm", schedule="edm"), tuning.at, **options)


def flow_map():
    tuning = TuningConfig(few_step="flow-map", q=2.0, stages=4, stage_images=48)
    return FlowMap(make_objective("flow", schedule="flow"), tuning.at)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_both_evaluations_of_a_consistency_loss_have_one_dropout_mask(kernels):
    train_step = make_step(kernels=kernels, objective=consistency(), accumulate=2)
    seeds, grads, real = [], [], train_step.model.forward

    def spy(x, t, dropout_seed=None, **cond):
        seeds.append(dropout_seed.item())
        grads.append(torch.is_grad_enabled())
        return real(x, t, dropout_seed, **cond)

    train_step.model.forward = spy
    train_step(batch(0), 0)
    assert grads == [True, False] * 2
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


def test_a_stage_depends_on_the_images_alone():
    objective = consistency()
    whole = make_step(objective=objective)
    losses = curve(whole, 5)
    assert objective.stage == 0.25  # the second stage, after 64 images
    again = make_step(objective=consistency())
    again.model.load_state_dict(whole.model.state_dict())
    assert curve(again, 1, start=9) == curve(whole, 1, start=9)
    assert objective.stage == 0.125
    assert len(set(losses)) == 5


def test_weights_in_another_layout_are_refused():
    model = UNet(SMALL).to(memory_format=torch.contiguous_format)
    objective = make_objective("eps", schedule="ddpm-linear", timesteps=1000, weighting="uniform")
    with pytest.raises(ValueError, match="channels_last"):
        TrainStep(
            model, objective, make_update("torch", model, EMA(model, 0.9), weight_decay=0.0), lr=LearningRate(1e-3),
            grad_clip=1.0, seed=0, bf16=False, compile=False,
        )  # fmt: skip


def test_bf16_trains_like_float32():
    low, full = curve(make_step(bf16=True), 10), curve(make_step(), 10)
    assert low != full
    assert low == pytest.approx(full, rel=0.02)


def assert_compiled_once(compiled, eager):
    """20 steps follow the eager ones; through the fixed input of `graphs` bit for bit; compiled once."""
    start = copy.deepcopy((compiled.model.state_dict(), compiled.update.ema.state_dict()))
    losses = curve(compiled, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += curve(compiled, 18, start=2)
        assert losses == pytest.approx(curve(eager, 20), rel=1e-3)
        end = copy.deepcopy(compiled.model.state_dict())
        compiled.model.load_state_dict(start[0])
        compiled.update.ema.load_state_dict(start[1], updates=0)
        moments = compiled.update.state_dict()
        for values in moments["state"].values():
            for value in values.values():
                value.zero_()
        compiled.update.load_state_dict(moments)
        compiled.graphs, compiled.images = True, None
        assert curve(compiled, 20) == losses
    assert all(torch.equal(value, end[name]) for name, value in compiled.model.state_dict().items())


FLAT = UNetConfig(
    image_size=8, channels=8, channel_mult=(1,), blocks_per_level=1, attention_resolutions=(), norm_groups=4
)


@pytest.fixture
def traced(monkeypatch):
    """`compile` traces a step as one graph (fullgraph=True), so that a graph break raises; Inductor has tests below."""
    torch._dynamo.reset()
    monkeypatch.setattr(step_module, "compiled", partial(torch.compile, fullgraph=True, backend="aot_eager"))


@pytest.mark.lab
def test_the_compiled_step_does_not_recompile(traced):
    assert_compiled_once(make_step(net=FLAT, compile=True), make_step(net=FLAT))


@pytest.mark.lab
def test_a_compiled_step_follows_its_precision(traced):
    def spread(model):  # as made, a network puts out 0 in each precision
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        return model

    losses = {}
    for compile in (False, True):
        train_step = make_step(net=FLAT, compile=compile, wrap=spread)
        for i, precision in enumerate(("bf16", "tf32", "fp32", "bf16")):
            train_step.compute_in(precision)
            losses[compile, i] = curve(train_step, 2, start=2 * i)
    for i in range(4):
        assert losses[True, i] == pytest.approx(losses[False, i], rel=1e-5)
    plain = curve(make_step(net=FLAT, wrap=spread), 2)
    assert losses[True, 0] != pytest.approx(plain, rel=1e-4)  # bf16 rounds


def test_gradients_in_another_layout_than_the_weights_give_the_same_update():
    """autograd.grad promises no strides, and fused Adam reads memory in order."""
    updates = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        train_step = make_step()
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            gradients = [torch.randn(p.shape, generator=generator) for p in train_step.parameters]
            gradients = [g.contiguous(memory_format=memory_format) if g.ndim == 4 else g for g in gradients]
            train_step.update.begin(lr=1e-2)
            train_step.update.add(gradients)
            train_step.update.apply(grad_clip=1.0)
        updates.append(train_step.parameters)
    for one, other in zip(*updates, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_step_s_times_can_be_told_again():
    train_step, seen = make_step(), []
    real = train_step.objective.loss

    def loss(model, x0, t, eps, **cond):
        seen.append(t)
        return real(model, x0, t, eps, **cond)

    object.__setattr__(train_step.objective, "loss", loss)
    for step in (0, 7):
        train_step(batch(step), step)
        assert torch.equal(seen[-1], train_step.times(16, step))
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_bad_loss_alone_is_passed_over_too(kernels):
    train_step = make_step(kernels=kernels)
    train_step.update.guarded = True  # as with skip_nonfinite
    train_step(batch(0), 0)
    before = copy.deepcopy([*train_step.parameters, *train_step.update.ema.model.parameters()])
    train_step.update.begin(lr=1e-3)
    train_step.update.add([torch.ones_like(w) for w in train_step.update.weights.values()])
    train_step.update.apply(grad_clip=1.0, good=torch.tensor(False))
    after = [*train_step.parameters, *train_step.update.ema.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


PLAIN = dataclasses.replace(SMALL, dropout=0.0)


@pytest.mark.lab
def test_the_fused_step_follows_the_plain_one():
    """The same mathematics in another order: losses agree, and so do the weights after 20 steps of Adam."""
    plain, fused = make_step(net=PLAIN), make_step(net=PLAIN, kernels="triton")
    assert curve(fused, 20) == pytest.approx(curve(plain, 20), rel=2e-4)
    difference = sum((a - b).square().sum() for a, b in zip(plain.parameters, fused.parameters, strict=True)).sqrt()
    moved = sum(
        (a - b).square().sum() for a, b in zip(plain.parameters, make_step(net=PLAIN).parameters, strict=True)
    ).sqrt()
    assert difference < 0.02 * moved
    for name, value in plain.update.ema.state_dict().items():
        torch.testing.assert_close(fused.update.ema.state_dict()[name], value, rtol=0.05, atol=2e-3)


def test_the_fused_step_computes_with_bf16_copies_of_its_masters():
    plain, fused = make_step(net=PLAIN, bf16=True), make_step(net=PLAIN, bf16=True, kernels="triton")
    assert curve(fused, 10) == pytest.approx(curve(plain, 10), rel=0.02)
    masters = dict(fused.model.named_parameters())
    assert fused.update.weights.keys() == masters.keys()
    half = {name for name, p in masters.items() if p in set(half_parameters(fused.model))}
    assert "conv_in.weight" in half
    assert "conv_in.bias" not in half
    for name, weight in fused.update.weights.items():
        assert masters[name].dtype == torch.float32
        assert weight.stride() == masters[name].stride()
        if name not in half:
            assert weight is masters[name]
        else:
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, masters[name].bfloat16())
        assert weight.storage_offset() % 64 == 0


@pytest.mark.lab
@pytest.mark.parametrize(("before", "after"), [("torch", "triton"), ("triton", "torch"), ("triton", "triton")])
@pytest.mark.parametrize("bf16", [False, True])
def test_either_update_goes_on_from_the_others_state(before, after, bf16):
    first = make_step(net=PLAIN, kernels=before, bf16=bf16)
    curve(first, 4)
    saved = copy.deepcopy((first.model.state_dict(), first.update.ema.state_dict(), first.update.state_dict()))
    assert saved[0].keys() == UNet(PLAIN).state_dict().keys() == saved[1].keys()
    assert all(value.dtype == torch.float32 for part in saved[:2] for value in part.values())
    expected = curve(first, 6, start=4)
    second = make_step(net=PLAIN, kernels=after, bf16=bf16)
    second.model.load_state_dict(saved[0])
    second.update.ema.load_state_dict(saved[1], updates=4)
    second.update.load_state_dict(saved[2])
    got = curve(second, 6, start=4)
    assert got == (expected if before == after else pytest.approx(expected, rel=0.02 if bf16 else 2e-4))


@pytest.mark.lab
def test_the_fused_step_compiles_as_one_graph_forward_and_backward():
    torch._dynamo.reset()
    net = UNetConfig(
        image_size=8, channels=8, channel_mult=(1,), blocks_per_level=1, attention_resolutions=(8,), norm_groups=4
    )
    assert_compiled_once(make_step(net=net, compile=True, kernels="triton"), make_step(net=net, kernels="triton"))


@pytest.mark.parametrize("options", [{}, {"graphs": True}, {"skip_nonfinite": True}])
def test_only_a_guarded_update_gives_the_average_a_mask(monkeypatch, options):
    """On a GPU the mask costs two more passes over all weights; guarded or not, the finite update is the same."""
    results, masks, real = [], [], EMA.blend
    monkeypatch.setattr(EMA, "blend", lambda self, decay, keep=None: (masks.append(keep), real(self, decay, keep)))
    for flags in ({}, options):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        update = make_update("torch", model, EMA(model, 0.9), weight_decay=0.0, **flags)
        update.begin(lr=0.1)
        update.add([torch.ones_like(w) for w in update.weights.values()])
        update.apply(grad_clip=1.0)
        results.append(torch.cat([p.flatten() for p in (*model.parameters(), *update.ema.model.parameters())]))
    assert masks[0] is None
    assert (masks[1] is None) == (not options)
    assert torch.equal(*results)

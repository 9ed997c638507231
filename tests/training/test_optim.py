"""Every optimizer, by PyTorch's kernels and by ours: groups, saved states, updates passed over."""

import copy

import pytest
import torch

from fastdiff.config import Config
from fastdiff.runtime.graphs import WARMUP, Captured
from fastdiff.training.ema import EMA
from fastdiff.training.groups import parameter_groups
from fastdiff.training.optim import OPTIMIZERS, LearningRate, make_update

KINDS = [(optimizer, kernels) for optimizer in OPTIMIZERS for kernels in ("torch", "triton")]
every_kind = pytest.mark.parametrize(("optimizer", "kernels"), KINDS)


class Grouped(torch.nn.Sequential):
    """The last layer learns at a rate of its own."""

    def parameter_groups(self):
        return [{"params": self[1].parameters(), "lr_scale": 0.1}, {"params": self[0].parameters()}]


def make(optimizer, kernels, *, network=torch.nn.Sequential, device="cpu", **settings):
    torch.manual_seed(0)
    model = network(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).to(device)
    settings = {"weight_decay": 0.01, "half": [model[0].weight] if kernels == "triton" else (), **settings}
    return make_update(kernels, model, EMA(model, 0.9), optimizer=optimizer, **settings)


def gradients(update, step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(w.shape, generator=generator).to(w) for w in update.weights.values()]


def take(update, steps, *, lr=0.1, good=None):
    for step in steps:
        update.begin(lr=lr * (step + 1) / 10)
        update.add(gradients(update, step))
        update.apply(grad_clip=1.0, good=good)


def tensors(update):
    """Weights, averages, and the optimizer's state, by its place."""
    state = update.state_dict()["state"]
    return [
        *(w.detach().clone() for w in (*update.parameters, *update.weights.values(), *update.ema.model.parameters())),
        *(value.clone() for i in sorted(state) for _, value in sorted(state[i].items())),
    ]


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every_kind
def test_a_groups_factor_scales_its_learning_rate(optimizer, kernels):
    """A step of a group at factor 0.1 is that of a network that learns at a tenth of the rate, bit for bit."""
    grouped, whole, tenth = (
        make(optimizer, kernels, network=Grouped),
        make(optimizer, kernels),
        make(optimizer, kernels),
    )
    for update, lr in ((grouped, 0.1), (whole, 0.1), (tenth, 0.1 * 0.1)):
        update.begin(lr=lr)
        update.add(gradients(update, 0))
        update.apply(grad_clip=1e9)
    expected = [*whole.parameters[:2], *tenth.parameters[2:]]
    assert all(torch.equal(p, q) for p, q in zip(grouped.parameters, expected, strict=True))
    assert not torch.equal(grouped.parameters[2], whole.parameters[2])


@every_kind
def test_a_saved_state_does_not_depend_on_groups_or_kernels(optimizer, kernels):
    """What any implementation saved, another loads in its place; and goes on as if it had made the steps itself."""
    for network in (torch.nn.Sequential, Grouped):
        first = make(optimizer, kernels, network=network)
        take(first, range(8))
        for other_kernels in ("torch", "triton"):
            second = make(optimizer, other_kernels, network=network)
            take(second, range(3))  # a state to be forgotten
            with torch.no_grad():
                for mine, theirs in zip(second.parameters, first.parameters, strict=True):
                    mine.copy_(theirs)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            saved, again = first.state_dict()["state"], second.state_dict()["state"]
            assert saved.keys() == again.keys() == {0, 1, 2, 3}
            assert all(torch.equal(saved[i][name], again[i][name]) for i in saved for name in saved[i])
            assert again[0]["step"] == 8
            assert again[2]["exp_avg"].shape == (3, 7)


@every_kind
def test_a_state_goes_on_bit_for_bit_under_other_groups(optimizer, kernels):
    """Groups may be named, split and reordered later: the state is that of the parameters."""
    first, second = make(optimizer, kernels), make(optimizer, kernels, network=Grouped)
    take(first, range(8))
    with torch.no_grad():
        for mine, theirs in zip(second.parameters, first.parameters, strict=True):
            mine.copy_(theirs)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for update in (first, second):
        update.begin(lr=0.1)
        update.add(gradients(update, 8))
        update.apply(grad_clip=1e9)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters[:2], second.parameters[:2], strict=True))


@every_kind
def test_a_state_from_before_the_first_step_is_loaded(optimizer, kernels):
    for other_kernels in ("torch", "triton"):
        first, second = make(optimizer, kernels), make(optimizer, other_kernels)
        second.load_state_dict(first.state_dict())
        fresh = make(optimizer, other_kernels)
        take(second, range(2))
        take(fresh, range(2))
        assert equal(tensors(second), tensors(fresh))


@every_kind
def test_an_update_that_is_not_good_is_as_if_it_had_not_been(optimizer, kernels):
    """Also the first one; and whether the gradient or the loss says so."""
    one, other = (make(optimizer, kernels, skip_nonfinite=True) for _ in range(2))
    for update in (one, other):
        updates = 0
        for step in range(9):
            if update is one:
                update.begin(lr=0.1)
                bad = gradients(update, step)
                if step % 2:
                    bad[1].fill_(torch.nan)
                update.add(bad)
                update.apply(grad_clip=1.0, good=torch.tensor(bool(step % 2)))
                update.ema.updates = updates  # the decay's warm-up counts every step
            take(update, [step])
            updates = update.ema.updates
    assert equal(tensors(one), tensors(other))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(
    ("optimizer", "beta2"), [(torch.optim.AdamW, 0.999), (torch.optim.AdamW, 0.9), (torch.optim.RAdam, 0.99)]
)
def test_ten_steps_follow_torch_optim(optimizer, beta2, kernels):
    """On parameters of their own, which PyTorch clips and updates one by one; and their average."""
    update = make(optimizer.__name__.lower().removesuffix("w"), kernels, half=(), weight_decay=0.1, beta2=beta2)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in update.parameters]
    options = {"decoupled_weight_decay": True} if optimizer is torch.optim.RAdam else {}
    theirs = optimizer(twins, weight_decay=0.1, betas=(0.9, beta2), **options)
    averages = [p.detach().clone() for p in twins]
    for step in range(10):  # RAdam is rectified from the 6th on
        update.begin(lr=0.1)
        update.add(gradients(update, step))
        norm = update.apply(grad_clip=1.0)
        for p, g in zip(twins, gradients(update, step), strict=True):
            p.grad = g
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(twins, 1.0).item(), rel=1e-6)
        theirs.param_groups[0]["lr"] = 0.1
        theirs.step()
        for average, p in zip(averages, twins, strict=True):
            average.lerp_(p.detach(), 1 - (2 + step) / (11 + step))
    for mine, other in zip(update.parameters, twins, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=1e-7)
    for mine, other in zip(update.ema.model.parameters(), averages, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    "groups",
    [
        lambda net: [{"params": net[0].parameters()}],
        lambda net: [{"params": net.parameters()}, {"params": net[1].parameters()}],
        lambda net: [{"params": net.parameters(), "lr_scale": -1.0}],
        lambda net: [{"params": net.parameters(), "lr": 0.1}],
    ],
)
def test_groups_that_cannot_be_are_refused(groups):
    net = Grouped(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net.parameter_groups = lambda: groups(net)
    with pytest.raises(ValueError, match="parameter group"):
        parameter_groups(net)


def rates(**options):
    """Of each step, and of the one after the last."""
    config = Config.of(lr=2.0, warmup_steps=4, **options)
    return [LearningRate.of(config)(step) for step in range((config.run.steps or 6) + 1)]


def test_a_constant_learning_rate_rises_and_stays():
    assert rates() == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert LearningRate(2.0)(0) == 2.0
    assert rates(steps=6) == rates()


def test_a_linear_decay_falls_from_the_warmups_end_to_0_at_the_last_step():
    assert rates(lr_decay="linear-decay", steps=8) == [0.5, 1.0, 1.5, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    assert rates(lr_decay="linear-decay", steps=5) == [0.5, 1.0, 1.5, 2.0, 2.0, 0.0]


def test_wsd_stays_and_falls_over_the_last_steps():
    plateau = [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates(lr_decay="wsd", steps=10, decay_fraction=0.4) == [*plateau, 2.0, 1.5, 1.0, 0.5, 0.0]
    assert rates(lr_decay="wsd", steps=8, decay_fraction=0.5) == rates(lr_decay="linear-decay", steps=8)
    assert rates(lr_decay="wsd", steps=8, decay_fraction=1e-9) == [*plateau, 2.0, 2.0, 0.0]


def test_a_learning_rate_may_change_where_no_step_was_made():
    constant, wsd, later = LearningRate(2.0, 4), LearningRate(2.0, 4, 6, 10), LearningRate(2.0, 4, 8, 10)
    for one, other, first in ((constant, wsd, 6), (wsd, constant, 6), (wsd, later, 6), (constant, later, 8)):
        assert one.agrees(other, first)
        assert not one.agrees(other, first + 1)
        assert [one(step) for step in range(first)] == [other(step) for step in range(first)]
    assert wsd.agrees(wsd, 10)
    assert not wsd.agrees(LearningRate(2.0, 4, 6, 12), 8)


@pytest.mark.gpu
@every_kind
def test_a_captured_update_is_the_plain_one(optimizer, kernels):
    """With a rate that changes, and a gradient that is not finite among the replays."""
    plain, captured = (make(optimizer, kernels, device="cuda", graphs=True) for _ in range(2))
    given = gradients(captured, 0)

    def body():
        captured.add(given)
        captured.apply(grad_clip=1.0)

    call = Captured(body, device=given[0].device, capture=True, what="the update")
    for step in range(WARMUP + 8):
        fresh = gradients(captured, step)
        if step == WARMUP + 3:
            fresh[0].fill_(torch.nan)
        torch._foreach_copy_(given, fresh)
        captured.begin(lr=0.01 * step)
        call()
        plain.begin(lr=0.01 * step)
        plain.add(fresh)
        plain.apply(grad_clip=1.0)
    for mine, other in zip(tensors(captured), tensors(plain), strict=True):
        torch.testing.assert_close(mine, other)

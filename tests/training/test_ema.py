import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastdiff.training.ema import EMA
from tests.numerics import assert_as_accurate


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(5, 6))
    return model.to(dtype)


def perturb(model, generator):
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def test_equals_torchs_averaged_model():
    model = network(torch.float64)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    theirs.update_parameters(model)  # torch's first update copies
    ours = EMA(model, 0.99, warmup=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        perturb(model, generator)
        ours.update()
        theirs.update_parameters(model)
    for mine, other in zip(ours.model.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_warm_up_forgets_the_initial_weights():
    model = network(torch.float64)
    initial = copy.deepcopy(model)
    ema = EMA(model, 0.9999)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for _ in range(100):
        ema.update()
    # What is left of the start is the product of (1 + n) / (10 + n), n = 1..100.
    left = torch.prod(
        (1 + torch.arange(1, 101, dtype=torch.float64)) / (10 + torch.arange(1, 101, dtype=torch.float64))
    )
    torch.testing.assert_close(ema.model[0].weight.data, initial[0].weight.data * left, rtol=1e-10, atol=0)
    assert left < 1e-6


def test_a_bf16_model_is_averaged_in_float32():
    model = network(torch.bfloat16)
    ema = EMA(model, 0.9999, warmup=False)
    before = ema.model[0].weight.clone()
    assert before.dtype == torch.float32
    with torch.no_grad():
        model[0].weight += 1
    ema.update()
    moved = ema.model[0].weight - before
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-4), rtol=0.05, atol=0)
    ema.copy_to(model)
    assert model[0].weight.dtype == torch.bfloat16


def test_buffers_are_copied_not_averaged():
    model = network()
    ema = EMA(model, 0.9)
    model[1].num_batches_tracked += 7
    model[1].running_mean += 3.0
    ema.update()
    assert ema.model[1].num_batches_tracked == 7
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert ema.model[1].num_batches_tracked.data_ptr() != model[1].num_batches_tracked.data_ptr()


def test_saved_averages_continue_exactly():
    model = network()
    generator = torch.Generator().manual_seed(1)
    unbroken = EMA(model, 0.99)
    for _ in range(5):
        perturb(model, generator)
        unbroken.update()
    resumed = EMA(network(), 0.99)
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()), updates=unbroken.updates)
    resumed._weights = unbroken._weights
    perturb(model, generator)
    unbroken.update()
    resumed.update()
    for name, value in unbroken.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(resumed.state_dict()[name], value)


def test_the_models_own_weights_are_left_alone_and_keep_their_layout():
    model = network().to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    ema = EMA(model, 0.5)
    ema.update()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert ema.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not ema.model.training


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_bad_decay_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(network(), decay)


@pytest.mark.parametrize("decay", [2 / 11, 0.9999])
def test_a_decay_on_the_device_gives_the_same_average(decay):
    """The captured step's way: no more error than the host's own, by the tolerance rule."""
    results = {}
    for kind, dtype in (("exact", torch.float64), ("host", torch.float32), ("device", torch.float32)):
        model, generator = network(dtype), torch.Generator().manual_seed(1)
        ema = EMA(model, 0.5)
        for _ in range(50):
            perturb(model, generator)
            ema.blend(torch.tensor(decay, dtype=torch.float64) if kind == "device" else decay)
        results[kind] = ema.model[0].weight.detach()
    assert_as_accurate(results["device"], results["host"], results["exact"])
    assert not torch.equal(results["device"], network()[0].weight)

"""Both loaders give the batches of `batch_plan`, bit for bit, from any step on."""

import random
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.data.datasets import ImageSet
from fastdiff.data.loaders import Batch, _epoch_order, batch_plan, make_loader
from fastdiff.errors import UserError

KINDS = ["dali", "resident"]


def image_set(n=50, height=6, width=5) -> ImageSet:
    images = np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    return ImageSet.from_arrays(images, None, "random")


def expected(data: ImageSet, flip=True, **plan):
    """The batch that the plan stands for, made without any loader."""
    indices, flips = batch_plan(len(data.images), **plan)
    mirrored = flips[:, None, None, None] & flip
    images = np.where(mirrored, data.images[indices][:, :, ::-1], data.images[indices])
    return Batch(torch.from_numpy(images), torch.from_numpy(indices))


def equal(batch, other) -> bool:
    return all(mine.dtype == other.dtype and mine.equal(other) for mine, other in zip(batch, other, strict=True))


def stream(n, batch_size, seed, steps, world_size, start=0):
    """The global stream's indices and flips over some steps."""
    plans = [
        batch_plan(n, batch_size=batch_size, seed=seed, step=step, rank=rank, world_size=world_size)
        for step in range(start, start + steps)
        for rank in range(world_size)
    ]
    return np.concatenate([p[0] for p in plans]), np.concatenate([p[1] for p in plans])


plans = st.fixed_dictionaries(
    {
        "n": st.integers(1, 40),
        "batch_size": st.integers(1, 30),
        "seed": st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)),
        "world_size": st.integers(1, 4),
    }
)


@given(plans)
def test_each_image_comes_exactly_once_an_epoch(plan):
    n, per_step = plan["n"], plan["batch_size"] * plan["world_size"]
    indices, _ = stream(steps=3 * n // per_step + 1, **plan)
    for epoch in range(3):
        assert sorted(indices[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(plans, st.integers(0, 50))
def test_ranks_are_disjoint_within_an_epoch(plan, step):
    n, world_size, batch_size = plan["n"], plan["world_size"], plan["batch_size"]
    seen = {}
    for rank in range(world_size):
        indices, _ = batch_plan(
            n, batch_size=batch_size, seed=plan["seed"], step=step, rank=rank, world_size=world_size
        )
        for i, index in enumerate(indices):
            epoch = ((step * world_size + rank) * batch_size + i) // n
            assert seen.setdefault((epoch, int(index)), rank) == rank


@given(plans, st.integers(0, 20))
def test_the_global_stream_is_the_same_for_every_world_size(plan, start):
    plan = {**plan, "steps": 4, "start": start}
    many = stream(**plan)
    one = stream(**{**plan, "batch_size": plan["batch_size"] * plan["world_size"], "world_size": 1})
    np.testing.assert_array_equal(many[0], one[0])
    np.testing.assert_array_equal(many[1], one[1])


def test_epochs_and_seeds_differ_and_half_is_mirrored():
    orders = {}
    for seed in (0, 1, 2**64 - 1):
        indices, flips = stream(n=1000, batch_size=100, seed=seed, steps=30, world_size=1)
        assert 1300 < flips.sum() < 1700
        assert not np.array_equal(flips[:1000], flips[1000:2000])
        orders.update({(seed, epoch): tuple(indices[epoch * 1000 : (epoch + 1) * 1000]) for epoch in range(3)})
    assert len(set(orders.values())) == len(orders)
    assert tuple(range(1000)) not in orders.values()


def test_flips_are_independent_of_the_order():
    """In one epoch, mirrored and unmirrored images differ neither in place nor in index."""
    indices, flips = batch_plan(20_000, batch_size=20_000, seed=3, step=0)
    for values in (np.arange(20_000), indices):
        assert abs(values[flips].mean() - values[~flips].mean()) < 5 * 20_000 / np.sqrt(12 * 5_000)


def test_the_stream_never_changes():
    """A run that is resumed with a later version must see the same images: pinned values."""
    indices, flips = batch_plan(10, batch_size=12, seed=7, step=1)
    assert indices.tolist() == [1, 6, 2, 5, 4, 8, 0, 7, 6, 7, 8, 4]
    assert flips.astype(int).tolist() == [0, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1]
    assert indices.dtype == np.int64
    assert flips.dtype == bool


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    plans,
    st.integers(0, 1000),
    st.booleans(),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_batches_are_the_plan(kind, plan, start_step, flip, shape):
    """So the two loaders are equal, restart anywhere, and keep their ranks apart as the plan does."""
    n = plan.pop("n") + 1
    data = image_set(n, *shape)
    plan["rank"] = plan["world_size"] - 1
    loader = make_loader(kind, data, start_step=start_step, flip=flip, **plan)
    for step in range(start_step, start_step + 5):
        assert loader.step == step
        batch = next(loader)
        assert equal(batch, expected(data, flip, step=step, **plan))
        assert (batch.images.dtype, batch.index.dtype) == (torch.uint8, torch.int64)
        assert batch.images.is_contiguous()
        assert {tensor.device.type for tensor in batch} == {"cpu"}
    loader.close()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(0, 3))
def test_dali_equals_resident_wherever_it_is_restarted(stop, seed):
    data = image_set(30)
    settings = {"batch_size": 8, "seed": seed}
    whole = list(islice(make_loader("resident", data, **settings), stop + 6))
    rest = make_loader("dali", data, start_step=stop, **settings)
    assert all(equal(next(rest), batch) for batch in whole[stop:])


@pytest.mark.parametrize("kind", KINDS)
def test_kept_batches_are_never_overwritten(kind):
    """DALI reuses its buffers: batches kept for long, and written to by their user, must stay apart."""
    data = image_set(64, 16, 16)
    loader = make_loader(kind, data, batch_size=16, seed=1)
    kept = list(islice(loader, 100))
    assert all(equal(batch, expected(data, step=step, batch_size=16, seed=1)) for step, batch in enumerate(kept))
    before = data.images.copy()
    for batch in kept[:50]:
        batch.images.zero_()
        batch.index.zero_()
    assert all(equal(b, expected(data, step=s, batch_size=16, seed=1)) for s, b in enumerate(kept) if s >= 50)
    assert equal(next(loader), expected(data, step=100, batch_size=16, seed=1))
    np.testing.assert_array_equal(data.images, before)


@pytest.mark.parametrize("kind", KINDS)
def test_loaders_leave_every_global_generator_alone(kind):
    def states():
        _, key, *rest = np.random.get_state()  # noqa: NPY002
        return random.getstate(), key.tolist(), rest, torch.get_rng_state().tolist()

    before = states()
    _epoch_order.cache_clear()  # as in a fresh process
    list(islice(make_loader(kind, image_set(), batch_size=20, seed=1), 5))
    assert states() == before


@pytest.mark.parametrize("kind", KINDS)
def test_two_loaders_at_once_do_not_disturb_each_other(kind):
    data = image_set()
    one, two = (make_loader(kind, data, batch_size=9, seed=seed) for seed in (1, 2))
    for step in range(8):
        assert equal(next(one), expected(data, step=step, batch_size=9, seed=1))
        assert equal(next(two), expected(data, step=step, batch_size=9, seed=2))


@pytest.mark.parametrize("kind", KINDS)
def test_close_ends_the_iterator(kind):
    loader = make_loader(kind, image_set(), batch_size=4, seed=0)
    assert iter(loader) is loader
    next(loader)
    loader.close()
    loader.close()
    assert list(loader) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "fast"}, "dali, resident"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"start_step": -1}, "start_step"),
        ({"world_size": 0}, "world_size"),
        ({"rank": -1}, "rank"),
        ({"rank": 2, "world_size": 2}, "rank"),
    ],
)
def test_arguments_out_of_range(change, named, user_error):
    arguments = {"kind": "resident", "image_set": image_set(), "batch_size": 4, "seed": 0} | change
    user_error(lambda: make_loader(**arguments), named)


def test_without_dali_the_error_names_the_other_loader(monkeypatch, user_error):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    user_error(lambda: make_loader("dali", image_set(), batch_size=4, seed=0), "nvidia-dali", "--loader resident")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flip", [True, False])
def test_on_cuda_batches_are_the_plan_and_stay_so(kind, flip):
    data = image_set(1000, 32, 32)
    loader = make_loader(kind, data, batch_size=128, seed=1, device="cuda", start_step=3, flip=flip)
    kept = list(islice(loader, 60))
    for step, batch in enumerate(kept, start=3):
        assert all(tensor.is_cuda for tensor in batch)
        assert batch.images.is_contiguous()
        assert equal([tensor.cpu() for tensor in batch], expected(data, flip, step=step, batch_size=128, seed=1))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_cuda_batches_are_ordered_on_the_current_stream(kind):
    data = image_set(1000, 32, 32)
    loader = make_loader(kind, data, batch_size=128, seed=1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for step in range(30):
            torch.cuda._sleep(10_000_000)  # a busy stream: whoever reads too early sees another batch
            batch = next(loader)
            assert equal([tensor.cpu() for tensor in batch], expected(data, step=step, batch_size=128, seed=1))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_cuda_a_batch_needs_no_host_sync(kind):
    loader = make_loader(kind, image_set(1000, 32, 32), batch_size=128, seed=1, device="cuda")
    next(loader)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # about a second: had a batch waited for it, the stream would be idle
        for _ in range(3):
            next(loader)
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_set_that_would_not_fit_on_the_device_is_refused_with_numbers(monkeypatch):
    data = image_set(n=50, height=64, width=64)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (data.images.nbytes, 2**40))
    message = "random has 0.0 GiB, but --loader resident leaves the network a fifth of the 0.0 GiB .*: use --loader"
    with pytest.raises(UserError, match=message):
        make_loader("resident", data, batch_size=2, seed=0, device="cuda")

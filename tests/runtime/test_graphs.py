"""The step through fixed buffers, as a CUDA graph replays it; on a CPU without the capture."""

import copy

import pytest
import torch

from fastdiff.errors import UserError
from fastdiff.runtime.graphs import WARMUP, Captured
from fastdiff.training.metrics import Metrics
from tests.numerics import Float64, assert_as_accurate
from tests.training.test_step import PLAIN, SMALL, batch, curve, make_step

BOTH = pytest.mark.parametrize("kernels", ["torch", "triton"])


def state_of(train_step):
    """Every tensor that a step leaves behind, by name."""
    optimizer = train_step.update.state_dict()["state"]
    moments = {f"{i}.{name}": value for i, each in optimizer.items() for name, value in each.items()}
    return {
        **{f"model.{k}": v for k, v in train_step.model.state_dict().items()},
        **{f"ema.{k}": v for k, v in train_step.update.ema.state_dict().items()},
        **{f"adam.{k}": v for k, v in moments.items()},
    }


def assert_same_state(one, other):
    a, b = state_of(one), state_of(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@BOTH
@pytest.mark.parametrize("bf16", [False, True])
def test_the_static_path_is_the_plain_one_bit_for_bit(kernels, bf16):
    plain, static = (make_step(kernels=kernels, bf16=bf16, graphs=graphs) for graphs in (False, True))
    assert curve(static, 20) == curve(plain, 20)
    assert_same_state(static, plain)


def test_the_batch_is_copied_so_that_a_loader_may_overwrite_it():
    plain, static = make_step(), make_step(graphs=True)
    buffer = torch.empty_like(batch(0))
    for step in range(3):
        plain(batch(step), step)
        static(buffer.copy_(batch(step)), step)
        buffer.zero_()
    assert static.metrics.state_dict() == plain.metrics.state_dict()


def test_a_batch_of_another_size_is_refused_by_the_flags_name():
    train_step = make_step(graphs=True)
    train_step(batch(0), 0)
    with pytest.raises(UserError, match=r"a batch of 8 x 8 x 8 x 3 .* captured for 16 x 8 x 8 x 3; use --no-graphs"):
        train_step(batch(1, n=8), 1)
    free = make_step()
    free(batch(0), 0)
    free(batch(1, n=8), 1)


@BOTH
@pytest.mark.parametrize("bf16", [False, True])
def test_loading_a_state_keeps_every_tensor_in_its_place(kernels, bf16):
    """A captured graph goes on writing to the addresses that it was captured with."""
    train_step = make_step(kernels=kernels, bf16=bf16, graphs=True)
    curve(train_step, 3)
    train_step(batch(3), 3)
    saved = copy.deepcopy(
        (train_step.model.state_dict(), train_step.update.ema.state_dict(), train_step.update.state_dict())
    )
    sums, places = train_step.metrics.state_dict(), {k: v.data_ptr() for k, v in state_of(train_step).items()}
    fixed = (*(getattr(train_step.metrics, name) for name in Metrics.NAMES), train_step.batch[0], train_step.number)
    places_of_fixed = [v.data_ptr() for v in fixed]

    def go_on():
        for step in range(4, 9):
            train_step(batch(step), step)
        return train_step.metrics.state_dict()

    expected = go_on()
    train_step.model.load_state_dict(saved[0])
    train_step.update.ema.load_state_dict(saved[1], updates=4)
    train_step.update.load_state_dict(saved[2])
    train_step.metrics.load_state_dict(sums)
    assert go_on() == expected
    steps = {name for name in places if name.endswith(".step")} if kernels == "triton" else set()  # made for the state
    now = state_of(train_step)
    assert {k: now[k].data_ptr() for k in places.keys() - steps} == {k: places[k] for k in places.keys() - steps}
    assert [v.data_ptr() for v in fixed] == places_of_fixed
    assert fixed[0] is train_step.metrics.loss
    assert fixed[-2] is train_step.batch[0]


def gradient(monkeypatch, **options):
    """The gradient that reaches the update, one flat tensor in the order of the parameters, and the loss."""
    train_step = make_step(net=PLAIN, **options)
    for p in train_step.parameters:  # the zero weights at the end of each branch would hide the others' gradients
        p.data.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    update, seen = train_step.update, []
    if options.get("kernels") == "triton":
        for flat in update.flats:
            if flat.half is not None:
                flat.half.copy_(flat.parameter)

    def apply(*, grad_clip, good):
        if options.get("kernels") == "triton":
            views = {p: v for f in update.flats for p, v in zip(f.parameters, f.views(f.total), strict=True)}
            seen.extend(views[p].detach().clone() for p in train_step.parameters)
        else:
            seen.extend(p.grad.clone() for p in train_step.parameters)
        return torch.zeros(())

    monkeypatch.setattr(update, "apply", apply)
    train_step(batch(0), 0)
    return torch.cat([v.flatten() for v in seen]), train_step.metrics.means()["loss"]


@BOTH
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_accumulating_gives_the_large_batchs_gradient(monkeypatch, kernels, bf16, graphs):
    exact, exact_loss = gradient(monkeypatch, wrap=Float64)
    options = {"kernels": kernels, "bf16": bf16, "graphs": graphs}
    whole, whole_loss = gradient(monkeypatch, **options)
    parts, parts_loss = gradient(monkeypatch, **options, accumulate=4)
    assert exact.dtype == torch.float64
    assert parts.dtype == torch.float32
    assert_as_accurate(parts, whole.float(), exact, "gradient")
    assert parts_loss == pytest.approx(whole_loss, rel=1e-6 if not bf16 else 1e-3)
    assert whole_loss == pytest.approx(exact_loss, rel=1e-5 if not bf16 else 1e-2)


@BOTH
def test_accumulating_trains_like_the_large_batch(kernels):
    whole, parts = (curve(make_step(net=PLAIN, kernels=kernels, accumulate=k), 10) for k in (1, 4))
    assert parts == pytest.approx(whole, rel=2e-4)


def test_bad_ways_to_accumulate_are_refused():
    with pytest.raises(ValueError, match="16 cannot be split into 3"):
        make_step(accumulate=3)(batch(0), 0)
    train_step = make_step(kernels="triton")
    train_step.accumulate = 2  # the update was not made for it
    with pytest.raises(ValueError, match="accumulate=True"):
        train_step(batch(0), 0)


def test_all_metrics_are_read_at_once_and_once_a_step(monkeypatch):
    train_step, reads = make_step(), []
    real = Metrics.transfer
    monkeypatch.setattr(Metrics, "transfer", lambda self: (reads.append(1), real(self))[1])
    for step in range(3):
        train_step(batch(step), step)
    before = train_step.metrics.state_dict()
    assert train_step.metrics.means(reset=False)["loss"] == before["loss"] / 3
    train_step.metrics.means()
    sums = {"loss": 0.0, "grad_norm": 0.0, "bad_step": -1, "skipped": 0, "in_a_row": 0}
    assert train_step.metrics.state_dict() == {**sums, "count": 0}
    assert len(reads) == 1
    assert real(train_step.metrics) == list(sums.values())


# On a GPU

gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def deterministic(request):
    """cuDNN's fixed algorithms, so that two runs agree bit for bit."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch._dynamo.reset()  # each step compiles the same code anew, which has its limit
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@gpu
@BOTH
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_captured_step_is_the_uncaptured_one(kernels, compile, accumulate):
    """Dropout is on: the graph draws t, noise and masks from the same seeds. PyTorch's own convolution and attention
    gradients may add in another order, so the curves are held to rounding where they are not equal."""
    options = {"net": SMALL, "bf16": True, "kernels": kernels, "compile": compile, "accumulate": accumulate}
    plain, captured = (make_step("cuda", graphs=graphs, **options) for graphs in (False, True))
    first, second = curve(plain, 20, "cuda"), curve(captured, 20, "cuda")
    assert captured.run.graph is not None
    assert captured.ready
    assert second[: WARMUP + 1] == pytest.approx(first[: WARMUP + 1], rel=1e-4)
    assert second == pytest.approx(first, rel=2e-3)
    a, b = state_of(plain), state_of(captured)
    start = make_step("cuda", **options).model.state_dict()
    for part in ("model", "ema"):
        moved = sum((a[f"{part}.{k}"] - v).square().sum() for k, v in start.items()).sqrt()
        apart = sum((a[f"{part}.{k}"] - b[f"{part}.{k}"]).square().sum() for k in start).sqrt()
        assert apart < 0.02 * moved


@gpu
@BOTH
def test_a_captured_step_goes_on_from_a_loaded_state(kernels):
    train_step = make_step("cuda", bf16=True, kernels=kernels, graphs=True)
    curve(train_step, 8, "cuda")
    saved = copy.deepcopy(
        (train_step.model.state_dict(), train_step.update.ema.state_dict(), train_step.update.state_dict())
    )
    expected = curve(train_step, 6, "cuda", start=8)
    fresh = make_step("cuda", bf16=True, kernels=kernels, graphs=True)
    for each in (train_step, fresh):  # one that has its graph already, and one that captures after loading
        each.model.load_state_dict(saved[0])
        each.update.ema.load_state_dict(saved[1], updates=8)
        each.update.load_state_dict(copy.deepcopy(saved[2]))
        assert curve(each, 6, "cuda", start=8) == pytest.approx(expected, rel=1e-3)


@gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_step_is_captured_anew_in_another_precision(compile):
    losses = []
    for graphs in (False, True):
        train_step, curves = make_step("cuda", compile=compile, kernels="triton", graphs=graphs), []
        for i, precision in enumerate(("bf16", "tf32", "fp32")):
            train_step.compute_in(precision)
            curves += curve(train_step, WARMUP + 3, "cuda", start=(WARMUP + 3) * i)
        losses.append(curves)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@gpu
@BOTH
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("graphs", "accumulate"), [(False, 1), (True, 1), (True, 4)])
def test_a_step_reads_nothing_on_the_host(compile, kernels, graphs, accumulate):
    train_step = make_step(
        "cuda", bf16=True, compile=compile, kernels=kernels, graphs=graphs, accumulate=accumulate
    )  # fmt: skip
    for step in range(WARMUP + 2):
        train_step(batch(step, "cuda"), step)
    images = batch(9, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(9, 12):
            train_step(images, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert train_step.metrics.state_dict()["bad_step"] == -1


@gpu
def test_a_captured_step_refuses_another_batch_size():
    train_step = make_step("cuda", graphs=True)
    for step in range(WARMUP + 1):
        train_step(batch(step, "cuda"), step)
    with pytest.raises(UserError, match="use --no-graphs"):
        train_step(batch(9, "cuda", n=8), 9)


@gpu
def test_work_that_reads_the_device_cannot_be_captured():
    x = torch.zeros((), device="cuda")
    call = Captured(lambda: x.add_(x.item()), device=x.device, capture=True, what="the step")
    for _ in range(WARMUP):
        call()
    with pytest.raises(UserError, match="use --no-graphs"):
        call()

"""upsample_conv beyond its contract: memory, types under autocast, one gradient alone, compiled and cached."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.test_upsampling import transposed
from fastdiff.runtime.device import set_backends
from kernels.upsample_conv import padded_sums, reference, upsample_conv
from tests.numerics import assert_as_accurate

SHAPES = [(2, 8, 5, 4, 8), (1, 3, 1, 1, 5), (3, 16, 8, 8, 4), (1, 1, 2, 7, 1)]  # N, C, H, W, C_out


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    device = torch.device(request.param)
    set_backends(device)  # no TF32, which is exact for these inputs but not for sums of weights
    return device


def drawn(shape, dtype, device=None):
    n, c, height, width, c_out = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, height, width, generator=generator)
    weight = torch.randn(c_out, c, 3, 3, generator=generator) / c**0.5
    gradient = torch.randn(n, c_out, 2 * height, 2 * width, generator=generator)
    return [v.bfloat16().to(device, dtype).contiguous(memory_format=torch.channels_last) for v in (x, weight, gradient)]


def outcome(fn, x, weight, gradient):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = fn(x, weight)
    return {"y": y.detach()} | dict(zip(("dx", "dweight"), torch.autograd.grad(y, (x, weight), gradient), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_upsampling_with_its_convolution(shape, dtype, device):
    inputs = drawn(shape, dtype, device)
    ours, eager = outcome(upsample_conv, *inputs), outcome(reference, *inputs)
    exact = outcome(reference, *(v.double() for v in inputs))
    for name, value in ours.items():
        assert value.dtype == dtype
        # cuDNN computes float64 in NCHW.
        assert value.is_contiguous(memory_format=torch.channels_last) or dtype == torch.float64
        assert_as_accurate(value, eager[name], exact[name], name)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_under_autocast_the_types_are_those_of_a_convolution(dtypes):
    """Gradients in the parameters' types; the weights' sums are rounded to bfloat16 once."""
    x, weight, gradient = drawn(SHAPES[0], torch.float32)
    x, weight, gradient = x.to(dtypes[0]), weight.to(dtypes[1]), gradient.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = outcome(upsample_conv, x, weight, gradient), outcome(reference, x, weight, gradient)
    exact = outcome(reference, *(v.double() for v in (x, weight, gradient)))
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype
        assert_as_accurate(value, eager[name], exact[name], name)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_one_gradient_alone_is_the_same_and_half_the_work(needed):
    x, weight, gradient = drawn(SHAPES[0], torch.float32)
    both = outcome(upsample_conv, x, weight, gradient)
    x, weight = x.requires_grad_(needed[0]), weight.requires_grad_(needed[1])
    y = upsample_conv(x, weight)
    with FlopCounterMode(display=False) as flops:
        y.backward(gradient)
    n, c, height, width, c_out = SHAPES[0]
    assert flops.get_total_flops() == 2 * 16 * n * c * c_out * height * width
    for v, name, wanted in ((x, "dx", needed[0]), (weight, "dweight", needed[1])):
        assert torch.equal(v.grad, both[name]) if wanted else v.grad is None


def test_a_second_derivative_is_refused():
    x, weight, gradient = (v.requires_grad_() for v in drawn(SHAPES[0], torch.float64))
    (dx,) = torch.autograd.grad(upsample_conv(x, weight), x, gradient, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_are_added_in_float32_or_better(dtype):
    _, weight, _ = drawn(SHAPES[0], dtype)
    sums, exact = padded_sums(weight), padded_sums(weight.double())
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_accurate(sums, exact.to(sums.dtype), exact)


def test_the_benchmarks_rival_computes_the_same():
    x, weight, gradient = drawn((2, 6, 5, 4, 6), torch.float64)
    rival, exact = outcome(transposed, x, weight, gradient), outcome(reference, x, weight, gradient)
    for name, value in rival.items():
        torch.testing.assert_close(value, exact[name])


def test_it_compiles_as_one_graph(compiled):
    inputs = drawn(SHAPES[0], torch.float32)
    run = torch.compile(upsample_conv, fullgraph=True)
    ours, eager, exact = (
        outcome(run, *inputs),
        outcome(reference, *inputs),
        outcome(reference, *(v.double() for v in inputs)),
    )
    for name, value in ours.items():
        assert_as_accurate(value, eager[name], exact[name], name)


def test_what_is_compiled_comes_from_the_cache_the_second_time(tmp_path, monkeypatch, compiled):
    """With its gradient, which an autograd.Function gives: see `set_backends`."""
    set_backends(torch.device("cpu"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    outcomes, hits = [], []
    for _ in range(2):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        run = torch.compile(upsample_conv, fullgraph=True)
        outcomes.append(outcome(run, *drawn(SHAPES[0], torch.float32)))
        hits.append(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 1]
    assert all(torch.equal(value, outcomes[1][name]) for name, value in outcomes[0].items())

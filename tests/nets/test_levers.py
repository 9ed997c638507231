"""The rules that wait for a GPU compute what the plain network computes."""

import pytest
import torch
import torch.nn.functional as F

from fastdiff.nets.forked_conv import forked_conv
from fastdiff.nets.fuse import RULES, fuse
from fastdiff.nets.graph import program
from fastdiff.nets.levers import LEVERS
from fastdiff.nets.unet import UNet
from tests.nets.test_fuse import SMALL, batch, make, outcome

SHAPES = [  # x, weight, bias, stride, padding
    pytest.param((2, 8, 6, 6), (16, 8, 3, 3), False, 1, 1, id="3x3"),
    pytest.param((2, 8, 5, 4), (4, 8, 3, 3), True, 1, 1, id="bias"),
    pytest.param((2, 8, 9, 9), (8, 8, 3, 3), True, 2, 0, id="stride 2"),
    pytest.param((3, 16, 4, 4), (8, 16, 1, 1), False, 1, 0, id="1x1"),
]


def drawn(x, weight, bias):
    torch.manual_seed(0)
    last = torch.channels_last
    inputs = [torch.randn(x).to(memory_format=last), torch.randn(weight).to(memory_format=last)]
    return [v.requires_grad_() for v in (*inputs, *([torch.randn(weight[0])] if bias else []))]


def results(conv, inputs, stride, padding):
    """y, and the gradients of all inputs."""
    x, weight, *bias = inputs
    y = conv(x, weight, bias[0] if bias else None, (stride, stride), (padding, padding))
    return y, *torch.autograd.grad(y, inputs, torch.ones_like(y).mul_(y.detach()))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("x", "weight", "bias", "stride", "padding"), SHAPES)
def test_a_forked_convolution_has_the_bits_of_the_plain_one(x, weight, bias, stride, padding, bf16):
    inputs = drawn(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        forked, plain = (results(conv, inputs, stride, padding) for conv in (forked_conv, F.conv2d))
    for ours, theirs in zip(forked, plain, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_a_gradient_that_nobody_needs_is_not_computed():
    x, weight, bias = drawn((2, 8, 6, 6), (4, 8, 3, 3), True)
    forked, plain = (
        torch.autograd.grad(conv(x.detach(), weight, bias, (1, 1), (1, 1)).square().sum(), (weight, bias))
        for conv in (forked_conv, F.conv2d)
    )
    assert all(map(torch.equal, forked, plain))


@pytest.mark.parametrize(("x", "weight", "bias", "stride", "padding"), SHAPES[1:3])
def test_a_forked_convolution_can_be_compiled(x, weight, bias, stride, padding):
    inputs = drawn(x, weight, bias)
    dy = F.conv2d(inputs[0], inputs[1], None, stride, padding).detach()
    images = [v.detach() for v in inputs[:2]]
    args = (dy, *images, [stride] * 2, [padding] * 2, bias)
    torch.library.opcheck(torch.ops.fastdiff.forked_conv_backward, args)
    compiled = torch.compile(forked_conv, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, results(compiled, inputs, stride, padding), results(F.conv2d, inputs, stride, padding)))


@pytest.mark.parametrize("name", LEVERS)
def test_a_lever_keeps_values_and_gradients(name):
    exact = make(UNet, SMALL).double()
    x, t = batch(SMALL)
    network = fuse(exact, [*RULES, LEVERS[name]])
    assert f" = {'forked' if name == 'fork' else 'padded'}_conv(" in program(network)
    truth, ours = (outcome(net, exact.named_parameters(), x.double(), t) for net in (exact, network))
    for key, value in truth.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-12, msg=key)


def test_forked_convolutions_are_all_that_a_network_has():
    network = fuse(make(UNet, SMALL), [*RULES, LEVERS["fork"]])
    assert "conv2d(" not in program(network)
    assert not [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]

"""The autoencoder: shapes, latents, and the same by our kernels."""

import pytest
import torch
from torch import nn

from fastdiff.diffusion.reconstruction import mirror
from fastdiff.errors import UserError
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.nets.autoencoder import LOG_VAR, Autoencoder
from fastdiff.nets.fuse import fuse

SMALL = {"factor": 2, "base_channels": 8, "blocks": 1}


def make(**changes):
    """With no weight at zero."""
    torch.manual_seed(0)
    net = Autoencoder(AutoencoderConfig(**SMALL | changes))
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return net


def batch(n=3, side=16, factor=2, channels=4, **to):
    x, noise = torch.randn(n, 3, side, side, **to), torch.randn(n, channels, side // factor, side // factor, **to)
    mirrored = torch.tensor([[True, False], [False, True], [True, True], [False, False]])[:n]
    return x.to(memory_format=torch.channels_last), noise, mirrored


@pytest.mark.parametrize(("factor", "side"), [(2, 20), (4, 24), (8, 16)])
@pytest.mark.parametrize("channels", [1, 5])
def test_latents_are_smaller_by_the_factor(factor, side, channels):
    net = make(factor=factor, latent_channels=channels, blocks=2)
    mean, log_var = net.encode(torch.randn(2, 3, side, side))
    assert mean.shape == log_var.shape == (2, channels, side // factor, side // factor)
    assert net.decode(mean).shape == (2, 3, side, side)
    assert all(p.ndim < 4 or p.is_contiguous(memory_format=torch.channels_last) for p in net.parameters())


def test_the_forward_pass_is_encode_and_decode():
    net = make()
    x, noise, mirrored = batch()
    whole, half, mean, log_var = net(x, noise, mirrored)
    z = mirror(mean + (log_var / 2).exp() * noise, mirrored)
    assert torch.equal(whole, net.decode(z))
    assert half.shape == (3, 3, 8, 8)
    assert torch.equal(net.encode(x)[0], mean)
    plain, nothing, *_ = make(equivariance=False)(x, noise, mirrored)
    assert nothing is None
    assert torch.equal(plain, net.decode(mean + (log_var / 2).exp() * noise))


def test_mirrors_are_mirrors():
    x = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(4, 1, 1, 1)
    mirrored = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    a, b, c, d = mirror(x, mirrored)
    assert torch.equal(a, x[0].flip(2))
    assert torch.equal(b, x[0].flip(1))
    assert torch.equal(c, x[0].flip(1, 2))
    assert torch.equal(d, x[0])


def test_log_variances_are_clamped_and_then_without_a_gradient():
    net = make()
    x, _, _ = batch()
    for bias, limit in ((100.0, LOG_VAR[1]), (-100.0, LOG_VAR[0])):
        nn.init.constant_(net.encoder.conv_moments.bias, bias)
        log_var = net.encode(x)[1]
        assert (log_var == limit).all()
        (gradient,) = torch.autograd.grad(log_var.sum(), [net.encoder.conv_in.weight])
        assert not gradient.any()


def test_grey_images_are_decoded_grey_from_the_start():
    """The last convolution starts at zero, so that all colours of grey images have the same gradients."""
    net = Autoencoder(AutoencoderConfig(**SMALL))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x = torch.randn(4, 1, 8, 8).expand(4, 3, 8, 8)
    for _ in range(3):
        loss = (net.decode(net.encode(x)[0]) - x).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    y = net.decode(net.encode(x)[0])
    assert y.any()
    torch.testing.assert_close(y[:, 0], y[:, 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"factor": 4, "blocks": 2, "latent_channels": 3}, {"equivariance": False}])
def test_our_kernels_compute_the_same(changes):
    net = make(**changes).double()
    factor = net.config.factor
    x, noise, mirrored = batch(factor=factor, channels=net.config.latent_channels, dtype=torch.float64)
    results = []
    for network in (net, fuse(net)):
        outputs = [y for y in network(x, noise, mirrored) if y is not None]
        total = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs)
        results.append((*outputs, *torch.autograd.grad(total, list(net.parameters()))))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11)
    decoder = fuse(net.eval().decoder)
    torch.testing.assert_close(decoder(noise), net.decode(noise), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"factor": 3}, "--factor is 3, but must be 2, 4, 8 or 16"),
        ({"factor": 1}, "--factor is 1"),
        ({"factor": 32}, "--factor is 32, but must be 2, 4, 8 or 16"),
        ({"latent_channels": 13}, "--latent-channels is 13, but must be at most 12"),
        ({"base_channels": 6}, "--base-channels is 6"),
        ({"base_channels": 132}, "--base-channels is 132"),
        ({"kl_weight": 0.0}, "--kl-weight is 0.0"),
    ],
)
def test_bad_shapes_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        AutoencoderConfig(**SMALL | flags)

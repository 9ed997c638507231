"""The autoencoder's loss against closed forms: Gaussians, and probabilistic PCA."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from fastdiff.diffusion.reconstruction import HALVED, PENALTY, SLOPE_STEP, Reconstruction, l1, l2, mirror
from fastdiff.diffusion.reconstruction import kl_divergence as ours


def test_the_divergence_is_that_of_gaussians():
    mean, log_var = torch.randn(5, 2, 3, 3).double(), torch.randn(5, 2, 3, 3).double()
    q = Normal(mean, (log_var / 2).exp())
    expected = kl_divergence(q, Normal(torch.zeros(()).double(), 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(ours(mean, log_var), expected)
    zero = torch.zeros(2, 4, requires_grad=True)
    assert not ours(zero, zero).any()  # at the prior, where it is smallest
    assert not torch.autograd.grad(ours(zero, zero).sum(), zero)[0].any()


def test_the_divergence_is_the_mean_over_samples():
    mean, log_var = torch.tensor([[0.7, -1.2]]).double(), torch.tensor([[0.3, -0.8]]).double()
    q, p = Normal(mean, (log_var / 2).exp()), Normal(torch.zeros(2).double(), 1.0)
    z = q.sample((200_000,))
    ratio = (q.log_prob(z) - p.log_prob(z)).sum((1, 2))
    assert abs(ratio.mean() - ours(mean, log_var)[0]) < 4 * ratio.std() / len(z) ** 0.5


def test_distances_are_means_over_values_at_each_resolution():
    x, y = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 8, 8).double()
    torch.testing.assert_close(l2(x, y)[1], F.mse_loss(x[1], y[1]))
    coarse = (
        [F.interpolate(v, size=4, mode="area") for v in (x, y)],
        [F.interpolate(v, size=2, mode="area") for v in (x, y)],
    )
    expected = sum(F.l1_loss(a[0], b[0]) for a, b in ((x, y), *coarse))
    torch.testing.assert_close(l1(x, y)[0], expected)
    assert not l1(x, x).any()
    x, y = x[:, :, :2, :2], y[:, :, :2, :2]  # halved once, to one pixel
    torch.testing.assert_close(l1(x, y)[0], F.l1_loss(x[0], y[0]) + F.l1_loss(x[0].mean((1, 2)), y[0].mean((1, 2))))


class Linear(nn.Module):
    """A linear autoencoder of 12 pixels and 3 latents, with one variance a latent."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, 3), nn.Linear(3, 12)
        self.log_var = nn.Parameter(torch.zeros(3))

    def forward(self, x, noise, mirrored):
        mean = self.encoder(x.flatten(1)).view(-1, 3, 1, 1)
        log_var = self.log_var.view(1, 3, 1, 1).expand_as(mean)
        z = mean + (log_var / 2).exp() * noise
        return self.decoder(z.flatten(1)).view(x.shape), None, mean, log_var


def test_a_linear_autoencoder_trained_by_it_is_probabilistic_pca():
    """Its loss is then the exact log-likelihood (Lucas et al. 2019; Tipping and Bishop 1999, equation 8)."""
    torch.manual_seed(0)
    data = torch.randn(400, 5).double() @ torch.randn(5, 12).double() * 0.3 + 0.2 * torch.randn(400, 12).double()
    centred = data - data.mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred / len(data)).flip(0)
    variance = values[3:].mean().item()
    best = -0.5 * (12 * math.log(2 * math.pi) + values[:3].log().sum().item() + 9 * math.log(variance) + 12)

    # Six noises with the mean and covariance of three normal variates: the mean of a quadratic loss over them is exact.
    sigma = 3**0.5 * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    x = data.view(-1, 1, 3, 2, 2).expand(-1, 6, 3, 2, 2).flatten(0, 1)
    eps = torch.zeros(len(data), 6, 12).double()
    eps[:, :, :3] = sigma
    eps = eps.view(-1, 3, 2, 2)
    loss = Reconstruction("l2", kl_weight=2 * variance, equivariance=False, latent_shape=(3, 1, 1))
    model = Linear().double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=2000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def total():
        return loss.loss(model, x, torch.zeros(len(x)), eps).mean()

    def closure():
        optimizer.zero_grad()
        value = total()
        value.backward()
        return value

    optimizer.step(closure)
    bound = -6 * math.log(2 * math.pi * variance) - 6 / variance * total().item()
    assert bound == pytest.approx(best, abs=1e-8)


class Blocks(nn.Module):
    """Latents are the means of blocks of four pixels, and blocks of one colour come back."""

    def __init__(self, shift=0):
        super().__init__()
        self.shift = shift

    def decode(self, z):
        return F.interpolate(z.roll(self.shift, 3), scale_factor=2.0)

    def forward(self, x, noise, mirrored):
        mean = F.avg_pool2d(x, 2)
        z = mirror(mean, mirrored)
        return self.decode(z), self.decode(F.avg_pool2d(z, 2)), mean, torch.zeros_like(mean)


def test_what_is_equivariant_has_no_error_and_what_is_not_has():
    x = F.interpolate(torch.randn(8, 3, 2, 2), scale_factor=4.0)  # halves and quarters lose nothing
    loss = Reconstruction("l1", kl_weight=1e-12, equivariance=True, latent_shape=(3, 4, 4))
    t, eps = torch.linspace(0, 0.99, 8), torch.randn(8, 3, 8, 8)
    assert loss.loss(Blocks(), x, t, eps).max() < 1e-6
    assert loss.loss(Blocks(shift=1), x, t, eps).min() > 0.1
    seen = []

    def model(x, noise, mirrored):
        seen.append(mirrored)
        return x, torch.zeros(8, 3, 4, 4), torch.zeros(8, 3, 4, 4), torch.zeros(8, 3, 4, 4)

    value = loss.loss(model, torch.ones(8, 3, 8, 8), t, eps)
    assert torch.allclose(value, torch.full((8,), HALVED * 3))  # ones against zeros, at three resolutions
    assert sorted(map(tuple, seen[0].tolist())) == sorted([(a, b) for a in (False, True) for b in (False, True)] * 2)


def test_the_latents_take_their_noise_from_that_of_the_images():
    loss = Reconstruction("l2", kl_weight=1.0, equivariance=False, latent_shape=(2, 2, 2))
    eps, noises = torch.randn(3, 3, 4, 4), []

    def model(x, noise, mirrored):
        noises.append(noise)
        return x, None, torch.zeros(3, 2, 2, 2), torch.zeros(3, 2, 2, 2)

    assert not loss.loss(model, torch.zeros(3, 3, 4, 4), torch.rand(3), eps).any()
    assert torch.equal(noises[0].flatten(1), eps.flatten(1)[:, :8])


def test_decoder_and_critic_have_gradients_of_their_own():
    """The decoder's is that of what the critic says, times the weight; the critic's knows nothing of the weight."""
    torch.manual_seed(0)
    fake, real, eps = (torch.randn(4, 3, 8, 8).double() for _ in range(3))
    fake.requires_grad_()
    weight = torch.randn(3, 8, 8).double().requires_grad_()

    def critic(images, frozen=False):
        return torch.tanh(images * (weight.detach() if frozen else weight)).sum((1, 2, 3))[:, None]

    def model(x, noise, mirrored):
        return fake, None, torch.zeros(4, 3, 1, 1).double(), torch.zeros(4, 3, 1, 1).double()

    shape = {"kl_weight": 1.0, "equivariance": False, "latent_shape": (3, 1, 1)}
    gradients = {}
    for heard in (0.0, 0.3):
        loss = Reconstruction("l2", **shape, critic_weight=0.3, critic_start=100)
        loss.weight_now = loss.weight_now.double()
        loss.advance(100 if heard else 99)
        assert loss.weight_now == heard
        loss.critic = critic
        total = loss.loss(model, real, torch.zeros(4), eps).sum()
        gradients[heard] = torch.autograd.grad(total, [fake, weight])
    plain = Reconstruction("l2", **shape).loss(model, real, torch.zeros(4), eps).sum()
    (without,) = torch.autograd.grad(plain, [fake])
    (opinion,) = torch.autograd.grad(critic(fake).sum(), [fake])
    torch.testing.assert_close(gradients[0.0][0], without)
    torch.testing.assert_close(gradients[0.3][0], without - 0.3 * opinion)
    torch.testing.assert_close(gradients[0.3][1], gradients[0.0][1])
    hinge = F.relu(1 - critic(real)).sum() + F.relu(1 + critic(fake.detach())).sum()
    slope = ((critic(real + SLOPE_STEP * eps) - critic(real)) / SLOPE_STEP).square().sum()
    (expected,) = torch.autograd.grad(hinge + PENALTY * slope, [weight])
    torch.testing.assert_close(gradients[0.0][1], expected)


def test_the_slope_is_the_squared_gradient_at_real_images():
    weight, real = torch.randn(3, 8, 8).double(), torch.randn(1, 3, 8, 8).double()

    def critic(images, frozen=False):
        return 5 + (images * weight).sum((1, 2, 3))[:, None]  # so that the hinge at real images is 0

    eps = torch.randn(20_000, 3, 8, 8).double()
    loss = Reconstruction("l2", kl_weight=1.0, equivariance=False, latent_shape=(3, 1, 1))
    fake = torch.zeros(20_000, 3, 8, 8).double()
    played = loss._adversarial(critic, fake, real.expand_as(fake) * 0, eps) - 6
    assert (played.mean() / PENALTY).item() == pytest.approx(weight.square().sum().item(), rel=0.05)


def test_a_critic_that_is_not_heard_yet_cannot_spoil_the_decoder():
    loss = Reconstruction(
        "l2", kl_weight=1.0, equivariance=False, latent_shape=(3, 1, 1), critic_weight=1, critic_start=9
    )
    loss.advance(8)
    x = torch.zeros(2, 3, 8, 8)
    scores = iter([torch.ones(2, 1), torch.ones(2, 1), -torch.ones(2, 1), torch.full((2, 1), torch.inf)])
    assert not loss._adversarial(lambda images, frozen=False: next(scores), x, x, x).any()

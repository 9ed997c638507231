"""What an autoencoder learns: to give images back from latents that stay near a standard normal."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.objectives import Model

PENALTY = 0.1  # weight of the squared slope of the critic at real images
SLOPE_STEP = 0.05  # standard deviation of the noise by which the slope is measured
HALVED = 0.25  # weight of images from latents of half the size, which have a quarter of the pixels


def kl_divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) in nats, (N,), summed over latents (N, ...) (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).flatten(1).sum(1)


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of images (N, C, H, W), and of both halved and quartered in size, added up: (N,).

    Images of one pixel are not halved.
    """
    total = (x - y).abs().flatten(1).mean(1)
    for _ in range(2 if min(x.shape[2:]) >= 4 else 1):
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        total = total + (x - y).abs().flatten(1).mean(1)
    return total


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of images (N, C, H, W): (N,)."""
    return (x - y).square().flatten(1).mean(1)


DISTANCES = {"l1": l1, "l2": l2}


class Reconstruction:
    """distance(x, decode(z)) + kl_weight KL / D with z = mean + std * noise, D values an image.

    With the distance `l2` and the weight 2 s^2 it equals 2 s^2 / D times the negative evidence lower bound of a decoder
    with pixel variance s^2, up to a constant. With equivariance, latents are mirrored at random before they
    are decoded, and decoded at half their size too; each must give the image that was changed alike (Kouzelis et al.
    2025, https://arxiv.org/abs/2502.09509, with mirrors in place of quarter turns).

    With a critic, decoder and critic play for the hinge loss (Lim and Ye 2017): the decoder raises critic_weight times
    what the critic says of its images; the critic, by gradients of its own, tells them apart, and its slope at real
    images is held small (R1, Mescheder et al. 2018, by a difference in place of a second derivative).

    It stands in the place of an `Objective` in a training step. There are no noise levels: t, in [0, 1), only picks one
    of four ways to mirror, and eps holds the latents' noise.

    Args:
        distance: a name in DISTANCES.
        latent_shape: (c, h, w).
        critic_start: in training images.

    Attributes:
        critic: `critic(images, frozen=False)`, or None; frozen, its weights have no gradient.
    """

    shares_dropout = False
    schedule = None

    def __init__(
        self, distance: str, *, kl_weight: float, equivariance: bool, latent_shape: tuple[int, int, int],
        critic_weight: float = 0.0, critic_start: int = 0, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.distance, self.kl_weight = DISTANCES[distance], kl_weight
        self.equivariance, self.latent_shape = equivariance, latent_shape
        self.critic_weight, self.critic_start = critic_weight, critic_start
        self.critic: Callable[..., Tensor] | None = None
        self.weight_now = torch.zeros((), device=device)  # of what the critic says of reconstructions

    def sample_t(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """(n,) in [0, 1): a quarter for each way to mirror an image."""
        return torch.rand(n, generator=generator, device=device)

    def advance(self, images: int) -> None:
        """The critic is heard from `critic_start` images on."""
        self.weight_now.fill_(self.critic_weight if images >= self.critic_start else 0.0)

    def log_snr(self, t: Tensor) -> None:
        """There are no noise levels."""

    def loss(self, model: Model, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The loss (N,) of each image, in the dtype of x0.

        Args:
            model: `model(x, noise, mirrored=)` as of `Autoencoder`.
            x0: (N, 3, H, W) in [-1, 1].
            t: (N,) from `sample_t`.
            eps: (N, 3, H, W) standard normal: the first values are the latents' noise, all probe the critic.
        """
        c, h, w = self.latent_shape
        noise = eps.flatten(1)[:, : c * h * w].unflatten(1, (c, h, w))
        mirrored = torch.stack([t < 0.5, (2 * t) % 1 < 0.5], 1)
        whole, half, mean, log_var = model(x0, noise, mirrored=mirrored)
        kl = kl_divergence(mean.to(x0.dtype), log_var.to(x0.dtype))
        if self.equivariance:
            x0 = mirror(x0, mirrored)
        loss = self.distance(whole.to(x0.dtype), x0) + self.kl_weight * kl / x0[0].numel()
        if self.equivariance:
            loss = loss + HALVED * self.distance(half.to(x0.dtype), F.avg_pool2d(x0, 2))
        return loss if self.critic is None else loss + self._adversarial(self.critic, whole, x0, eps)

    def _adversarial(self, critic: Callable[..., Tensor], fake: Tensor, real: Tensor, eps: Tensor) -> Tensor:
        """What critic and decoder lose (N,), each with gradients of its own."""

        def mean(scores: Tensor) -> Tensor:
            return scores.to(real.dtype).flatten(1).mean(1)

        of_real, of_perturbed = critic(real), critic(real + SLOPE_STEP * eps)
        squared_slope = (of_perturbed - of_real).to(real.dtype).square() / SLOPE_STEP**2
        hinge = mean(F.relu(1 - of_real)) + mean(F.relu(1 + critic(fake.detach())))
        opinion = mean(critic(fake, frozen=True))
        return hinge + PENALTY * mean(squared_slope) - torch.where(self.weight_now > 0, self.weight_now * opinion, 0.0)


def mirror(x: Tensor, mirrored: Tensor) -> Tensor:
    """x (N, C, H, W), each mirrored left to right and upside down where `mirrored` (N, 2) says so."""
    sideways, upside_down = mirrored[:, 0, None, None, None], mirrored[:, 1, None, None, None]
    x = torch.where(sideways, x.flip(3), x)
    return torch.where(upside_down, x.flip(2), x)

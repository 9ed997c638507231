"""Images from a trained network, in batches of bounded memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.diffusion.objectives import Model, Objective
from fastdiff.diffusion.samplers import SAMPLERS, OnStep
from fastdiff.errors import UserError
from fastdiff.evaluation.frechet import to_uint8


@dataclass(frozen=True)
class SamplerSettings:
    """How samples are drawn.

    Args:
        name: a name in SAMPLERS.
        steps: network evaluations for each sample.
        eta: of ddim, in [0, 1]; 0 for samplers without it.

    Raises:
        UserError: an unknown sampler, or an eta that it does not have.
    """

    name: str
    steps: int
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise UserError(f"sampler {self.name!r} is unknown; choose one of {', '.join(SAMPLERS)}.")
        if self.eta and self.name != "ddim":
            raise UserError(f"--eta belongs to ddim; {self.name} has none.")

    @property
    def options(self) -> dict[str, float]:
        """What the sampler function takes beyond the common arguments."""
        return {"eta": self.eta} if self.name == "ddim" else {}


def batch_count(n: int, batch_size: int) -> int:
    """How many batches n samples come in. Raises UserError for n or batch_size below 1."""
    if n < 1 or batch_size < 1:
        raise UserError(f"cannot draw {n} samples in batches of {batch_size}; both must be at least 1.")
    return -(-n // min(batch_size, n))


def sample_batches(
    model: Model,
    objective: Objective,
    n: int,
    *,
    settings: SamplerSettings,
    image_shape: tuple[int, int, int],
    batch_size: int,
    seed: int,
    device: torch.device,
    bf16: bool,
    on_step: OnStep | None = None,
) -> Iterator[Tensor]:
    """Draw n images, a batch at a time; the same for the same seed, n, batch size and machine.

    Every batch is of the same size and the last is cut, so that a compiled network sees one shape. The network runs in
    bfloat16 if asked; the state of the sampler is float32. Estimates of x0 are clamped to [-1, 1].

    Args:
        model: `model(x_t, t)`, in eval mode.
        n: images, at least 1.
        image_shape: (C, H, W).
        on_step: see `samplers`; called in every batch.

    Yields:
        uint8 (b, C, H, W) on `device`, b <= batch_size.

    Raises:
        UserError: n or batch_size below 1, or more steps than the schedule has.
    """
    count = batch_count(n, batch_size)
    batch_size = min(batch_size, n)
    ts = objective.schedule.grid(settings.steps)
    sampler: Callable[..., Tensor] = SAMPLERS[settings.name]

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return objective.denoise(model, x_t, t)

    generator = torch.Generator(device).manual_seed(seed)
    c, height, width = image_shape
    for i in range(count):
        with torch.no_grad():
            # Drawn in NHWC order, so that the state is channels_last from the start.
            x_T = torch.randn(batch_size, height, width, c, generator=generator, device=device).permute(0, 3, 1, 2)
            x_0 = sampler(
                denoise,
                objective.schedule,
                x_T,
                ts,
                clip_x0=True,
                generator=generator,
                on_step=on_step,
                **settings.options,
            )
            yield to_uint8(x_0[: n - i * batch_size])


def trajectory(
    model: Model,
    objective: Objective,
    *,
    settings: SamplerSettings,
    image_shape: tuple[int, int, int],
    seed: int,
    device: torch.device,
    bf16: bool,
    samples: int = 4,
    columns: int = 10,
) -> tuple[Tensor, Tensor, list[float]]:
    """What a sampler sees on its way: x_t and x0_hat at evenly spaced steps, first and last included.

    Returns:
        x_t and x0_hat, uint8 (samples, columns, C, H, W) on the CPU, and the time of each column. With fewer steps than
        columns there is one column for each step.
    """
    columns = min(columns, settings.steps)
    kept = {round(i * (settings.steps - 1) / max(columns - 1, 1)) for i in range(columns)}
    seen: list[tuple[Tensor, Tensor]] = []

    def on_step(i: int, x_t: Tensor, x0_hat: Tensor) -> None:
        if i in kept:
            seen.append((to_uint8(x_t), to_uint8(x0_hat)))

    for _ in sample_batches(
        model, objective, samples, settings=settings, image_shape=image_shape, batch_size=samples, seed=seed,
        device=device, bf16=bf16, on_step=on_step,
    ):  # fmt: skip
        pass
    x_t, x0_hat = (torch.stack(images, 1).cpu() for images in zip(*seen, strict=True))
    times = objective.schedule.grid(settings.steps)
    return x_t, x0_hat, [times[i].item() for i in sorted(kept)]

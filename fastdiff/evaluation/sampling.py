"""Images from a trained network, in batches of bounded memory."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastdiff.diffusion.loops import Loop, OnStep, eager_loop
from fastdiff.diffusion.objectives import Model, Objective
from fastdiff.diffusion.samplers import SAMPLERS, evaluations, own_options
from fastdiff.errors import UsageError
from fastdiff.evaluation.frechet import to_uint8
from fastdiff.evaluation.graph_loop import GraphLoop
from fastdiff.nets.fuse import half_parameters

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class SamplerSettings:
    """How samples are drawn.

    Args:
        name: a name in SAMPLERS.
        steps: steps of the sampler, each from one time of the grid to the next; most samplers evaluate the network
            once in each (see `evaluations`).
        eta: of ddim, in [0, 1]; 0 for samplers without it.
        spacing: of the grid, see `Schedule.grid`; `auto` is the schedule's own.
        extra: the sampler's other options, by their names in its function.

    Raises:
        UsageError: an unknown sampler, no step, or an option or eta that it does not have.
    """

    name: str
    steps: int
    eta: float = 0.0
    spacing: str = "auto"
    extra: Mapping[str, float | int | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise UsageError(f"sampler {self.name!r} is unknown; choose one of {', '.join(SAMPLERS)}.")
        if self.steps < 1:
            raise UsageError(f"--steps is {self.steps}, but must be at least 1.")
        if self.eta and self.name != "ddim":
            instead = f"; use --options eta={self.eta:g}" if "eta" in own_options(self.name) else ""
            raise UsageError(f"--eta belongs to ddim, not to {self.name}{instead}.")
        if not 0.0 <= self.eta <= 1.0:
            raise UsageError(f"--eta is {self.eta}, but must lie in [0, 1] (0: deterministic, 1: as noisy as ddpm).")
        _check_options(self.name, self.extra)

    @property
    def options(self) -> dict[str, float | int | str]:
        """What the sampler function takes beyond the common arguments."""
        return {"eta": self.eta, **self.extra} if self.name == "ddim" else dict(self.extra)

    @property
    def evaluations(self) -> int:
        """Network evaluations for each sample."""
        return evaluations(self.name, self.steps, corrector_steps=int(self.extra.get("corrector_steps", 1)))

    @property
    def label(self) -> str:
        """The sampler's name, with whatever is not its default: unipc (log-snr, order=2)."""
        parts = [self.spacing] if self.spacing != "auto" else []
        parts += [
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.extra.items()
        ]
        return f"{self.name} ({', '.join(parts)})" if parts else self.name


def parse_options(name: str, pairs: Sequence[str]) -> dict[str, float | int | str]:
    """Options of a sampler from the command line's NAME=VALUE, with the types that it gives them.

    Raises:
        UsageError: an unknown sampler or option, or a value of another type.
    """
    if name not in SAMPLERS:
        raise UsageError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}.")
    options: dict[str, float | int | str] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--options {pair} is not of the form NAME=VALUE, e.g. order=2.")
        _check_options(name, (key,))
        kind = type(own_options(name)[key])
        try:
            options[key] = kind(text)
        except ValueError:
            raise UsageError(f"--options {pair}: {key} of {name} is of type {kind.__name__}.") from None
    return options


def _check_options(name: str, keys: Iterable[str]) -> None:
    known = own_options(name).keys() - ({"eta"} if name == "ddim" else set())  # which has a flag of its own
    for key in keys:
        if key not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise UsageError(f"--options {key}: {name} has no such option; {has}.")


def half_weights(model: Network) -> Network:
    """A copy in eval mode whose convolutions and linear layers hold bfloat16 weights.

    Under autocast it computes what the model would, without casting every weight anew in every step.
    """
    half = copy.deepcopy(model).requires_grad_(False).eval()
    for p in half_parameters(half):
        p.data = p.data.bfloat16()
    return half


def _batch_seed(seed: int, batch: int) -> int:
    """The 63-bit seed of all randomness in a batch; that of the first is the given one."""
    if batch == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


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
    graphs: bool = True,
    loop: GraphLoop | None = None,
    on_step: OnStep | None = None,
    progress: Callable[[float], object] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Tensor]:
    """Draw n images, a batch at a time; the same for the same seed, n, batch size and machine.

    Each batch has a seed of its own, so that several ranks can share them out: each draws every `ranks`-th batch, from
    that of its own number on, and together they draw what one alone would.

    Every batch is of the same size and the last is cut, so that a compiled network sees one shape. The network runs in
    bfloat16 if asked; the state of the sampler is float32. Estimates of x0 are clamped to [-1, 1]. However large n is,
    memory is that of one batch, and a step is captured once.

    Args:
        model: `model(x_t, t)`, in eval mode.
        n: images, at least 1.
        image_shape: (C, H, W).
        graphs: on CUDA, capture a sampling step in a CUDA graph and replay it; see `GraphLoop`.
        loop: with `graphs`, what captured the steps of earlier calls with this model and objective, to replay them;
            one call at a time may use it.
        on_step: see `samplers`; called in every batch.
        progress: called after each step with the images drawn so far, a step counting as its share of a batch.
        rank, ranks: this process among all.

    Yields:
        uint8 (b, C, H, W) on `device`, b <= batch_size.

    Raises:
        UserError: n or batch_size below 1, more steps than the schedule has, or a model that cannot be captured.
    """
    if n < 1 or batch_size < 1:
        raise UsageError(f"cannot draw {n} samples in batches of {batch_size}; both must be at least 1.")
    batch_size = min(batch_size, n)
    ts = objective.schedule.grid(settings.steps, spacing=settings.spacing)
    sampler: Callable[..., Tensor] = SAMPLERS[settings.name]

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return objective.denoise(model, x_t, t)

    kept = loop if loop is not None else GraphLoop()
    generator = kept.generator(device)
    run: Loop = kept if graphs else eager_loop
    c, height, width = image_shape
    for start in range(rank * batch_size, n, ranks * batch_size):
        generator.manual_seed(_batch_seed(seed, start // batch_size))

        def after(i: int, x_t: Tensor, x0_hat: Tensor, start: int = start) -> None:
            if progress is not None:
                progress(min(n, start + batch_size * min(1.0, (i + 1) / settings.steps)))
            if on_step is not None:
                on_step(i, x_t, x0_hat)

        with torch.no_grad(), record_function("sampling"):
            # Drawn in NHWC order, so that the state is channels_last from the start.
            z = torch.randn(batch_size, height, width, c, generator=generator, device=device).permute(0, 3, 1, 2)
            x_0 = sampler(
                denoise,
                objective.schedule,
                objective.schedule.prior_std * z,
                ts,
                clip_x0=True,
                generator=generator,
                on_step=after if on_step is not None or progress is not None else None,
                loop=run,
                **settings.options,
            )
            images = to_uint8(x_0[: n - start])
        yield images


def trajectory(
    model: Model,
    objective: Objective,
    *,
    settings: SamplerSettings,
    image_shape: tuple[int, int, int],
    seed: int,
    device: torch.device,
    bf16: bool,
    graphs: bool = True,
    loop: GraphLoop | None = None,
    samples: int = 4,
    columns: int = 10,
) -> tuple[Tensor, Tensor, list[float]]:
    """What a sampler sees on its way: x_t, scaled as for the network, and x0_hat at evenly spaced steps, first and
    last included.

    Returns:
        x_t and x0_hat, uint8 (samples, columns, C, H, W) on the CPU, and the time of each column. With fewer steps than
        columns there is one column for each step.
    """
    columns = min(columns, settings.steps)
    kept = {round(i * (settings.steps - 1) / max(columns - 1, 1)) for i in range(columns)}
    seen: list[tuple[Tensor, Tensor]] = []

    times = objective.schedule.grid(settings.steps, spacing=settings.spacing)
    scales = objective.schedule.c_in(times).tolist()

    def on_step(i: int, x_t: Tensor, x0_hat: Tensor) -> None:
        if i in kept:
            seen.append((to_uint8(scales[i] * x_t), to_uint8(x0_hat)))

    for _ in sample_batches(
        model, objective, samples, settings=settings, image_shape=image_shape, batch_size=samples, seed=seed,
        device=device, bf16=bf16, graphs=graphs, loop=loop, on_step=on_step,
    ):  # fmt: skip
        pass
    x_t, x0_hat = (torch.stack(images, 1).cpu() for images in zip(*seen, strict=True))
    return x_t, x0_hat, [times[i].item() for i in sorted(kept)]

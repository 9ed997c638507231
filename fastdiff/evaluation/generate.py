"""Images from a network, in batches of bounded memory: what commands, evaluations and training runs use alike."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastdiff.diffusion import plan
from fastdiff.diffusion.guidance import guidance_weight, guide
from fastdiff.diffusion.objectives import Objective
from fastdiff.diffusion.plan import OnStep, Plan
from fastdiff.diffusion.samplers import PLANS, own_options
from fastdiff.diffusion.schedule import FEW_STEP_LEVEL, Schedule
from fastdiff.errors import UsageError
from fastdiff.evaluation.graph_loop import Conditions, GraphLoop
from fastdiff.evaluation.space import PIXELS, Space
from fastdiff.model_sections import Guidance
from fastdiff.nets.fuse import half_parameters
from fastdiff.nets.split import split_conditions
from fastdiff.nets.text import PAD
from fastdiff.runtime.device import compiled

GUIDE = "guide."  # before the names of what a guide is told
NONE = Guidance()


@dataclass(frozen=True)
class SamplerSettings:
    """How samples are drawn.

    Args:
        name: a name in PLANS.
        steps: steps of the sampler, each from one time of the grid to the next; most samplers evaluate the network
            once in each (see `plan.evaluations`).
        eta: of ddim, in [0, 1]; 0 for samplers without it.
        spacing: of the grid, see `Schedule.grid`; `auto` is the schedule's own, but few-step for consistency.
        extra: the sampler's other options, by their names in its function.
        last_level: of spacing few-step.

    Raises:
        UsageError: an unknown sampler, no step, or an option or eta that it does not have.
    """

    name: str
    steps: int
    eta: float = 0.0
    spacing: str = "auto"
    extra: Mapping[str, float | int | str] = field(default_factory=dict)
    last_level: float = FEW_STEP_LEVEL

    def __post_init__(self) -> None:
        if self.name not in PLANS:
            raise UsageError(f"sampler {self.name!r} is unknown; choose one of {', '.join(PLANS)}.")
        if self.steps < 1:
            raise UsageError(f"--steps is {self.steps}, but must be at least 1.")
        if self.eta and self.name != "ddim":
            instead = f"; use --options eta={self.eta:g}" if "eta" in own_options(self.name) else ""
            raise UsageError(f"--eta belongs to ddim, not to {self.name}{instead}.")
        if not 0.0 <= self.eta <= 1.0:
            raise UsageError(f"--eta is {self.eta}, but must lie in [0, 1] (0: deterministic, 1: as noisy as ddpm).")
        _check_options(self.name, self.extra)

    def times(self, schedule: Schedule) -> Tensor:
        """The grid (steps + 1,) float64. Raises UserError where the schedule has no such grid."""
        return schedule.grid(self.steps, spacing=self._spacing, last_level=self.last_level)

    @property
    def _spacing(self) -> str:
        return "few-step" if self.name == "consistency" and self.spacing == "auto" else self.spacing

    def plan(self, schedule: Schedule) -> Plan:
        """The sampler's steps on the schedule. Raises UserError for a grid or an option that it does not have."""
        options = {"eta": self.eta, **self.extra} if self.name == "ddim" else self.extra
        return PLANS[self.name](schedule, self.times(schedule), **options)

    @property
    def label(self) -> str:
        """The sampler's name, and what differs from its defaults: unipc (log-snr, order=2)."""
        parts = [self.spacing] if self.spacing != "auto" else []
        if self._spacing == "few-step" and self.last_level != FEW_STEP_LEVEL:
            parts.append(f"last_level={self.last_level:g}")
        parts += [f"{key}={f'{value:g}' if isinstance(value, float) else value}" for key, value in self.extra.items()]
        return f"{self.name} ({', '.join(parts)})" if parts else self.name


def parse_options(name: str, pairs: Sequence[str]) -> dict[str, float | int | str]:
    """Options of a sampler from the command line's NAME=VALUE, with the types that it gives them.

    Raises:
        UsageError: an unknown option, or a value of another type.
    """
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


def half_weights(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose convolutions and linear layers hold bfloat16 weights.

    Under autocast it computes what the model would, without casting all weights again in every step.
    """
    half = copy.deepcopy(model).requires_grad_(False).eval()
    for p in half_parameters(half):
        p.data = p.data.bfloat16()
    return half


def _batch_seed(seed: int, batch: int) -> int:
    """The 63-bit seed of all randomness in a batch; the first batch takes the given seed itself."""
    if batch == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def on_device(conditions: Conditions, device: torch.device) -> Conditions:
    """The conditions there, tokens in float32."""
    return {name: v.to(device, torch.float32 if v.is_floating_point() else v.dtype) for name, v in conditions.items()}


def padded(nothing: Tensor, given: Tensor | None) -> Tensor:
    """The empty text, tokens (L', D), mask or ids (L',), with as many positions as a text (N, L, ...) has, L >= L'."""
    if given is None or nothing.ndim == 0:
        return nothing
    shape = given.shape[1] - len(nothing), *nothing.shape[1:]
    return torch.cat([nothing, nothing.new_full(shape, PAD if nothing.dtype == torch.int64 else 0)])


class Generator:
    """Draws images from a network.

    The network runs in bfloat16 if asked; the state of the sampler is float32. Estimates of x0 that are pixels are
    clamped to [-1, 1].
    Every batch has the same size, and the last is cut, so that a compiled network sees one shape. Only one batch is in
    memory at a time. Each kind of step is compiled and captured once, however many images are drawn.

    Args:
        network: `network(x_t, t, **conditions)`, in eval mode; its weights may change in place between calls.
        shape: (C, H, W) of what the network sees.
        batch_size: images drawn at a time, at least 1.
        bf16: autocast activations, and compute with bfloat16 copies of the weights.
        compile: torch.compile the network.
        graphs: capture a sampling step in a CUDA graph and replay it (CUDA only); see `GraphLoop`.
        nothing: what each condition of the network is where nothing is asked for, one row (...) each. With `text` among
            them the network is cut in two, see `split_conditions`.
        guide: another network of the same objective, in eval mode, from which guidance leads away; by default it is the
            network with `nothing`.
        space: of the network.

    Attributes:
        image_shape: (3, H, W) of the images.

    Raises:
        UserError: a batch size below 1, or steps that the schedule does not have.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        settings: SamplerSettings,
        *,
        shape: tuple[int, int, int],
        batch_size: int,
        device: torch.device,
        bf16: bool = False,
        compile: bool = False,
        graphs: bool = True,
        nothing: Conditions | None = None,
        guide: nn.Module | None = None,
        space: Space = PIXELS,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"cannot draw images in batches of {batch_size}; it must be at least 1.")
        self.network, self.objective, self.settings = network, objective, settings
        self.shape, self.batch_size, self.device = shape, batch_size, device
        self.space, self.image_shape = space, space.image_shape(shape)
        self.bf16, self.graphs = bf16, graphs
        self.plan = settings.plan(objective.schedule)
        self.net = half_weights(network) if bf16 else network  # what computes
        self.nothing = on_device(nothing or {}, device)
        self.guide = half_weights(guide) if bf16 and guide is not None else guide
        nets = [net for net in (self.net, self.guide) if net is not None]
        self.prepares: list[Callable[..., Conditions]] = [dict for _ in nets]  # conditions as they are given
        if "text" in self.nothing:  # what reading it takes is done once for all steps
            self.prepares, nets = map(list, zip(*map(split_conditions, nets), strict=True))
        self.loop = GraphLoop(self._denoiser(*map(compiled, nets) if compile else nets), device)
        self.few_loop = GraphLoop(self._denoiser(*nets), device)  # not worth compiling

    def _denoiser(
        self, model: Callable[..., Tensor], other: Callable[..., Tensor] | None = None
    ) -> Callable[..., Tensor]:
        def denoise(x_t: Tensor, t: Tensor, *r: Tensor, guidance: Tensor | None = None, **told: Tensor) -> Tensor:
            x0_hat = self.objective.denoise
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                if guidance is None:
                    return self.space.clip(x0_hat(model, x_t, t, *r, **told))
                if other is None:  # the conditions have 2 N rows: what is asked for, then nothing
                    asked, rest = x0_hat(model, torch.cat([x_t, x_t]), t, *r, **told).chunk(2)
                else:
                    others = {name.removeprefix(GUIDE): told.pop(name) for name in list(told) if name.startswith(GUIDE)}
                    asked, rest = x0_hat(model, x_t, t, *r, **told), x0_hat(other, x_t, t, *r, **others)
                weight = guidance_weight(self.objective.schedule, t, guidance)
                return self.space.clip(guide(asked, rest, weight))

        return denoise

    def by(self, settings: SamplerSettings) -> "Generator":
        """One that draws otherwise, from the same network, compiled once. Raises UserError as `Generator` does."""
        other = copy.copy(self)
        other.settings, other.plan = settings, settings.plan(self.objective.schedule)
        return other

    def batches(
        self,
        n: int,
        *,
        seed: int,
        conditions: Conditions | None = None,
        guidance: Guidance = NONE,
        columns: int | None = None,
        on_step: OnStep | None = None,
        progress: Callable[[float], object] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> Iterator[Tensor]:
        """Draw n images, a batch at a time; the same for the same seed, n, batch size and machine.

        Each batch has its own seed, so that ranks can share the batches: rank r draws batches r, r + ranks, and so on.
        Together they draw what one rank would draw alone.

        Args:
            n: images, at least 1.
            conditions: one row for each of the n images, (n, ...) each; by default nothing is asked for.
            guidance: how strongly images are led to what is asked for, or away from `guide`.
            columns: images whose places differ by a multiple of it start from the same noise, as those of a column of a
                picture; they are few, and the network is not compiled for them.
            on_step: see `plan.run`; called in every batch.
            progress: called after each step with the images drawn so far, a step counting as its share of a batch.
            rank, ranks: this process among all.

        Yields:
            uint8 (b, C, H, W) on the device, b <= batch_size.

        Raises:
            UserError: n below 1, or a network that cannot be captured.
        """
        if n < 1:
            raise UsageError(f"cannot draw {n} images; there must be at least 1.")
        self.check(guidance)
        self._take_weights()
        size, loop = min(self.batch_size, n), self.loop if columns is None else self.few_loop
        for start in range(rank * size, n, ranks * size):

            def after(i: int, x_t: Tensor, x0_hat: Tensor, start: int = start) -> None:
                if progress is not None:
                    progress(min(n, start + size * min(1.0, (i + 1) / self.settings.steps)))
                if on_step is not None:
                    on_step(i, x_t, x0_hat)

            # The last batch's missing images repeat the last condition.
            place = torch.arange(start, start + size).clamp(max=n - 1)
            given = self._asked(size, {name: v[place] for name, v in (conditions or {}).items()}, guidance)
            if columns is None:
                x_T = self._noise(loop, _batch_seed(seed, start // size), size)
            else:
                x_T = self._noise(loop, seed, columns)[place % columns]
            x_0 = self._draw(loop, x_T, given, None if on_step is None and progress is None else after)
            yield self._images(x_0)[: n - start]

    def trajectory(
        self, *, seed: int, conditions: Conditions | None = None, guidance: Guidance = NONE, samples: int = 4,
        columns: int = 8,
    ) -> tuple[Tensor, Tensor, list[float]]:  # fmt: skip
        """What the sampler sees on its way: x_t, scaled as for the network, and x0_hat at evenly spaced steps, first
        and last included; latents as the decoder shows them.

        Args:
            conditions: one row for each sample.

        Returns:
            x_t and x0_hat, uint8 (samples, columns, C, H, W) on the CPU, and the time of each column. With fewer steps
            than columns there is one column for each step.
        """
        self._take_weights()
        columns = min(columns, self.settings.steps)
        kept = {round(i * (self.settings.steps - 1) / max(columns - 1, 1)) for i in range(columns)}
        times = self.settings.times(self.objective.schedule)
        scales = self.objective.schedule.c_in(times).tolist()
        seen: list[tuple[Tensor, Tensor]] = []

        def on_step(i: int, x_t: Tensor, x0_hat: Tensor) -> None:
            if i in kept:
                seen.append((self._images(scales[i] * x_t), self._images(x0_hat)))

        given = self._asked(samples, dict(conditions or {}), guidance)
        self._draw(self.few_loop, self._noise(self.few_loop, seed, samples), given, on_step)
        x_t, x0_hat = (torch.stack(images, 1).cpu() for images in zip(*seen, strict=True))
        return x_t, x0_hat, [times[i].item() for i in sorted(kept)]

    def _images(self, x0: Tensor) -> Tensor:
        """uint8 (n, 3, H, W)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.space.decode(x0)

    def _take_weights(self) -> None:
        if self.net is not self.network:
            self.net.load_state_dict(self.network.state_dict())

    def check(self, *guidances: Guidance) -> None:
        """Raise UsageError where the network has nothing that guidance could lead away from, or a guide for nothing."""
        scale = next((guidance.scale for guidance in guidances if guidance.scale != 1), 1)
        if scale != 1 and self.guide is None and not self.nothing:
            raise UsageError(
                f"--guidance is {scale:g}, but the network knows no classes or texts to be led to; add --guide and an "
                "earlier checkpoint to lead away from, or drop it."
            )
        if scale == 1 and self.guide is not None:
            raise UsageError("--guide does nothing at --guidance 1; add --guidance 2, say, or drop it.")

    @torch.no_grad()
    def _asked(self, n: int, given: Conditions, guidance: Guidance) -> Conditions:
        """What the denoiser is told about n images: the conditions as `prepare` gives them, by its names.

        With guidance also w and its interval, in a tensor, so that one captured graph serves all; and either what the
        guide is told, or 2 n rows: what is asked for, then nothing.
        """
        given, (prepare, *prepare_guide) = on_device(given, self.device), self.prepares
        nothing = {name: padded(v, given.get(name)).repeat(n, *[1] * v.ndim) for name, v in self.nothing.items()}
        given = {**nothing, **given}
        numbers = {"guidance": torch.tensor(guidance.numbers, device=self.device).expand(n, 3)}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if guidance.scale == 1:
                return prepare(**given)
            if prepare_guide:
                led = {f"{GUIDE}{name}": v for name, v in prepare_guide[0](**given).items()}
                return {**numbers, **led, **prepare(**given)}
            if guidance.scale == 0 and guidance.interval is None:
                return prepare(**nothing)
            return {**numbers, **prepare(**{name: torch.cat([given[name], v]) for name, v in nothing.items()})}

    def _noise(self, loop: GraphLoop, seed: int, n: int) -> Tensor:
        """x_T, float32 (n, C, H, W); what the loop's sampler draws later is of the same seed."""
        generator, (c, height, width) = loop.generator.manual_seed(seed), self.shape
        # Drawn in NHWC order, so that the state is channels_last from the start.
        z = torch.randn(n, height, width, c, generator=generator, device=self.device).permute(0, 3, 1, 2)
        return self.objective.schedule.prior_std * z

    @torch.no_grad()
    def _draw(self, loop: GraphLoop, x_T: Tensor, conditions: Conditions, on_step: OnStep | None) -> Tensor:
        """x_0, float32 (n, C, H, W)."""
        with record_function("sampling"):
            if self.graphs:
                return loop.run(self.plan, x_T, conditions=conditions, on_step=on_step)

            def denoise(x_t: Tensor, *t: Tensor) -> Tensor:
                return loop.denoise(x_t, *t, **conditions)

            return plan.run(self.plan, denoise, x_T, generator=loop.generator, on_step=on_step)

"""The suite's machinery: sizes, comparisons of several workloads, and how their times become rows."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import machine
from bench.bars import BARS, Better, verdict
from bench.results import Ratio, Results, Row
from bench.timing import WARM_UP, Samples, Stopwatch, Workload, interleave
from fastdiff.config import Config
from fastdiff.data.datasets import ImageSet
from fastdiff.model_sections import UNetConfig
from fastdiff.nets.unet import UNet
from fastdiff.presets import PRESETS
from fastdiff.runtime.device import environment, set_backends


@dataclass(frozen=True)
class Size:
    """How much is measured.

    config           network, batch and evaluation
    device
    images           in the training set
    bf16             activations, and the kernels' main inputs
    ours             whether our kernels, and captured graphs, are measured: on a CPU they are PyTorch code
    steps            network evaluations of a sampling
    overhead_steps   the same, where samplers are compared with the bare network
    sampler_batches
    flat             elements of the flat buffers of the optimizer's kernels; whole blocks of flat.ALIGNMENT
    norms            (batch, channels, height = width) of GroupNorm; groups as in the config
    budget           seconds for the rounds of a comparison
    tiles            a file of bench/tune_norms.py, whose tiles the step is timed with; None: the levers are timed
    trial            tiny shapes that show nothing but that the code runs
    """

    config: Config
    device: torch.device
    images: int
    bf16: bool
    ours: bool
    steps: int
    overhead_steps: int
    sampler_batches: tuple[int, ...]
    flat: int
    norms: tuple[tuple[int, int, int], ...]
    budget: float
    tiles: Path | None = None
    trial: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the kernels' main inputs."""
        return torch.bfloat16 if self.bf16 else torch.float32


DDPM, QUICK = PRESETS["ddpm-cifar10"], PRESETS["quick"]
TINY = UNetConfig(
    image_size=8, channels=8, channel_mult=(1,), blocks_per_level=1, attention_resolutions=(8,), norm_groups=4,
    dropout=0.1,
)  # fmt: skip


def make_size(name: str) -> Size:
    """`gpu`: the DDPM CIFAR-10 baseline; `cpu`: the preset quick; `tiny`: a trial of all GPU variants on a CPU.

    `cpu` is to take less than 5 minutes on two cores.
    """
    if name == "gpu":
        # Half of the network's eleven norms: the widest and narrowest groups, and every height.
        norms = ((128, 128, 32), (128, 384, 32), (128, 256, 16), (128, 512, 16), (128, 256, 8), (128, 512, 4))
        return Size(
            DDPM, torch.device("cuda"), 50_000, bf16=True, ours=True, steps=50, overhead_steps=10,
            sampler_batches=(1, 16, 256), flat=35_746_368, norms=norms, budget=1.5,
        )  # fmt: skip
    if name == "cpu":
        return Size(
            QUICK, torch.device("cpu"), 1797, bf16=False, ours=False, steps=5, overhead_steps=5,
            sampler_batches=(1, 16, 64), flat=1_017_088, norms=((16, 128, 32), (16, 256, 8)), budget=1.0,
        )  # fmt: skip
    config = QUICK.replace(net=TINY, batch_size=4, timesteps=20, eval_samples=4, eval_batch_size=4, eval_steps=2)
    return Size(
        config, torch.device("cpu"), 16, bf16=False, ours=True, steps=2, overhead_steps=3, sampler_batches=(1, 16),
        flat=3008, norms=((2, 16, 4),), budget=0.0, trial=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Against:
    """A ratio to be taken of a row.

    other    a variant of the same comparison, or FLOOR: the row's FLOP at the rate of the measured matrix product
    better   `lower`: own time / other's time; `higher`: other's time / own time; both to a unit of each workload
    bar      a name in BARS, or None
    plus     another variant whose time is added to the row's own
    """

    other: str
    better: Better
    bar: str | None = None
    plus: str | None = None


FLOOR = "compute floor"


@dataclass(frozen=True)
class Comparison:
    """Workloads that are timed in the same rounds.

    build    makes them by variant name; it may skip, with a reason
    variants the names
    ratios   variant -> what it is compared with
    queued   see Stopwatch
    """

    group: str
    case: str
    variants: tuple[str, ...]
    build: Callable[[], dict[str, Workload]]
    ratios: Mapping[str, tuple[Against, ...]]
    queued: bool = False


class Bench:
    """Measures comparisons on one machine and keeps their rows."""

    def __init__(self, size: Size) -> None:
        self.size = size
        set_backends(size.device)
        self.stopwatch = Stopwatch(size.device)
        self.ceilings = machine.ceilings(size.device, self.stopwatch, budget=size.budget, scale=64 if size.trial else 1)
        self.environment = environment(size.device)
        self.rows: list[Row] = []

    def results(self) -> Results:
        """All rows that have been recorded."""
        return Results(self.environment, self.ceilings, self.rows)

    def measure(self, comparison: Comparison) -> dict[str, tuple[Row, Samples]]:
        """Time a comparison; the workloads' memory is free afterwards."""
        # A function's compiled forms are kept with its code; beyond a limit PyTorch would quietly run it eagerly.
        torch.compiler.reset()
        workloads = comparison.build()
        if set(workloads) != set(comparison.variants):
            raise ValueError(f"{comparison.group} {comparison.case}: built {set(workloads)}, not {comparison.variants}")
        samples = interleave(
            workloads, self.stopwatch, queued=comparison.queued, budget=self.size.budget,
            warm_up=1 if self.size.trial else WARM_UP,
        )  # fmt: skip
        measured = {v: (self._row(comparison, v, workloads, samples), samples[v]) for v in comparison.variants}
        del workloads
        if self.size.device.type == "cuda":
            torch.cuda.empty_cache()
        return measured

    def _row(
        self, comparison: Comparison, variant: str, workloads: dict[str, Workload], samples: dict[str, Samples]
    ) -> Row:
        work, time = workloads[variant], samples[variant]
        flops_s, bytes_s = work.flops / time.median, work.bytes / time.median
        share = (
            flops_s / self.ceilings["flops_s"]
            if work.flops
            else bytes_s / self.ceilings["bytes_s"]
            if work.bytes
            else None
        )
        return Row(
            comparison.group,
            comparison.case,
            variant,
            seconds=time.median,
            spread=time.spread,
            rounds=len(time.seconds),
            calls=time.calls,
            images_s=work.images / time.median if work.images else None,
            gb_s=bytes_s / 1e9 if work.bytes else None,
            tflop_s=flops_s / 1e12 if work.flops else None,
            share=share,
            ratios=tuple(
                self._ratio(against, variant, workloads, samples) for against in comparison.ratios.get(variant, ())
            ),
        )

    def _ratio(
        self, against: Against, variant: str, workloads: dict[str, Workload], samples: dict[str, Samples]
    ) -> Ratio:
        """The median over rounds; in each round all workloads ran back to back."""

        def per_unit(name: str) -> list[float]:
            return [seconds / workloads[name].units for seconds in samples[name].seconds]

        own = per_unit(variant)
        if against.plus is not None:
            own = [a + b for a, b in zip(own, per_unit(against.plus), strict=True)]
        if against.other == FLOOR:
            floor = workloads[variant].flops / workloads[variant].units / self.ceilings["flops_s"]
            other = [floor] * len(own)
        else:
            other = per_unit(against.other)
        value = statistics.median(a / b for a, b in zip(own, other, strict=True))
        value = value if against.better == "lower" else 1 / value
        judged = against.bar is not None and (
            self.size.device.type == "cuda" or self.size.trial or BARS[against.bar].on_cpu
        )
        return Ratio(
            against.other, value, against.better, verdict(against.bar, value) if judged and against.bar else None
        )


@cache
def image_set(n: int, side: int) -> ImageSet:
    """n images of noise: what is in them does not change how fast they move."""
    images = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    return ImageSet.from_arrays(images, np.zeros(n, dtype=np.int64), "noise")


@cache
def network_flops(config: UNetConfig) -> tuple[int, int]:
    """FLOP an image of the network: forward, and forward + backward. Counted on the meta device; 2 a multiply-add."""
    with torch.device("meta"):
        net = UNet(config)
        x = torch.empty(1, config.image_channels, config.image_size, config.image_size)
        t = torch.empty(1)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        net(x, t)
    with FlopCounterMode(display=False) as both:
        net(x, t).sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


def to_device(values: dict, device: torch.device) -> dict:
    """A copy of a kernel's arguments; strides are kept."""
    return {name: v.to(device, copy=True) if isinstance(v, Tensor) else v for name, v in values.items()}

"""The performance bars: what a measured ratio has to reach, and what it should."""

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Bar:
    """A bar on a ratio.

    better   whether the ratio should be small (a cost over a floor) or large (a gain over a baseline)
    least    what it must reach
    aim      what it should reach; None where there is only a limit
    on_cpu   whether it holds on a CPU too
    """

    better: Better
    least: float
    aim: float | None
    on_cpu: bool = False


BARS: dict[str, Bar] = {
    "7": Bar("higher", 10.0, 50.0, on_cpu=True),  # loader images/s over training images/s
    "8 forward": Bar("lower", 1.25, 1.1),  # GroupNorm + SiLU over a device copy of the same bytes
    "8 backward": Bar("lower", 1.4, 1.2),
    "9": Bar("lower", 1.15, 1.05),  # EMA update over a device copy of the same bytes
    "10": Bar("higher", 1.2, 1.4),  # Adam + EMA: torch fused + foreach over ours
    "11": Bar("lower", 2.2, 1.7),  # step over the compute floor by the measured matrix product
    "12": Bar("higher", 1.25, 1.4),  # step: torch.compile + bf16 + channels_last with stock operators over ours
    "13": Bar("higher", 6.0, 10.0),  # step: eager fp32 with a DataLoader over ours
    "14 batch 1": Bar("higher", 4.0, 6.0),  # DDIM-50: uncaptured over captured
    "14 batch 16": Bar("higher", 2.5, 4.0),
    "14 batch 256": Bar("higher", 1.05, 1.2),
    "15": Bar("lower", 1.02, 1.005),  # step with loader over step on a constant batch
    "16": Bar("lower", 0.25, 0.1),  # evaluation over the training steps between two of them
    "guard": Bar("lower", 0.005, None, on_cpu=True),  # what notices numbers that are not finite, over a training step
    "sampler": Bar("lower", 1.05, None, on_cpu=True),  # a sampler's network evaluation over the bare network's
}


def verdict(name: str, value: float) -> str:
    """One phrase, such as `bar 9: 1.07, at most 1.15 met, aim 1.05 missed`."""
    bar = BARS[name]

    def judged(limit: float) -> str:
        reached = value <= limit if bar.better == "lower" else value >= limit
        return f"{limit:g} {'met' if reached else 'missed'}"

    words = f"bar {name}: {value:.3g}, at {'most' if bar.better == 'lower' else 'least'} {judged(bar.least)}"
    return words if bar.aim is None else f"{words}, aim {judged(bar.aim)}"

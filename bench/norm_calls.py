"""The norms of the CIFAR-10 U-Net as its training step calls them, read off the fused network, and their tiles."""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdiff.model_sections import UNetConfig
from fastdiff.nets.fuse import fuse
from fastdiff.nets.unet import UNet
from kernels import add_group_norm_silu, group_norm_silu, launch
from kernels.launch import NormTiles

GROUPS = 32


@dataclass(frozen=True)
class NormCall:
    """One call of a norm.

    channels   of what is normalised
    side       its height and width
    own        channels of x; a skip connection brings the others
    residual   whether one is added to x
    gradients  of the sum, which the backward adds: from its other readers, 0 to 2
    silu       whether SiLU follows
    dropout    whether that does too; such a norm adds up nothing but a shift
    """

    channels: int
    side: int
    own: int
    residual: bool
    gradients: int
    silu: bool
    dropout: bool

    @property
    def images(self) -> tuple[int, int]:
        """Images that are read: forward, backward (x or the sum, dy, and the sum's other gradients)."""
        return 1 + self.residual + (self.own < self.channels), 2 + self.gradients

    @property
    def moved(self) -> tuple[int, int]:
        """Channels read and written: forward, backward. A sum that is formed is written too."""
        c = self.channels
        forward = 2 * c if self.dropout else 3 * c + self.residual * self.own
        return forward, (3 + self.gradients) * c

    @property
    def variant(self) -> str:
        """What it switches on, by the nearest name in kernels/group_norm_jobs.py, which has no less."""
        if self.dropout:
            return "shift+dropout"
        return "add, none" if not self.silu else "add, kept" if self.gradients == 2 else "add"


def norm_calls(config: UNetConfig) -> Counter[NormCall]:
    """How often a training step makes each call; `config` must have dropout, or second norms look like others."""
    seen: Counter[NormCall] = Counter()

    class Norms(fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            if n.op == "call_function" and n.target in (group_norm_silu, add_group_norm_silu):
                x, on = self.env[n.args[0]], n.kwargs
                channels = len(self.env[n.args[1]])
                sums = sum(bool(each.users) for each in n.users if each.args[1] > 0) if on.get("seed") is None else 0
                seen[
                    NormCall(
                        channels, x.shape[2], x.shape[1], on.get("residual") is not None, sums,
                        on["activation"] == "silu", on.get("seed") is not None,
                    )
                ] += 1  # fmt: skip
            return result

    norms = Norms(fuse(UNet(config)), garbage_collect_values=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, config.image_channels, config.image_size, config.image_size)
        norms.run(x.to(memory_format=torch.channels_last), torch.empty(1), None)
    return seen


@dataclass(frozen=True)
class Task:
    """One pass of the calls that share tiles.

    call     the most frequent one, which is timed
    images   that the calls read, at most
    weight   channels that all the calls of a step move, times pixels: what good tiles are worth
    """

    call: NormCall
    backward: bool
    images: int
    weight: int

    @property
    def key(self) -> tuple[int, int, int, bool, bool]:
        """In NORM_TILES."""
        return self.call.channels, self.call.side**2, GROUPS, self.backward, self.call.dropout

    @property
    def rule(self) -> NormTiles:
        """What launch.py chooses where nothing is measured."""
        with mock.patch.object(launch, "NORM_TILES", {}):
            channels, pixels, groups, backward, dropout = self.key
            return launch.norm_tiles(channels, pixels, groups, itemsize=2, backward=backward, dropout=dropout)

    @property
    def label(self) -> str:
        call, what = self.call, "backward" if self.backward else "forward"
        read = "" if call.dropout or call.residual else ", no residual"
        return f"{call.channels} channels, {call.side}x{call.side}, {call.variant}{read}, {what}"


@cache
def all_tasks() -> tuple[Task, ...]:
    """The most time first."""
    alike: dict[tuple[int, int, bool], dict[NormCall, int]] = {}
    for call, times in norm_calls(UNetConfig(dropout=0.1)).items():
        alike.setdefault((call.channels, call.side, call.dropout), {})[call] = times
    tasks = []
    for calls in alike.values():
        most = max(calls, key=lambda call: (calls[call], sum(call.moved)))
        for backward in (False, True):
            weight = sum(times * call.moved[backward] * call.side**2 for call, times in calls.items())
            tasks.append(Task(most, backward, max(call.images[backward] for call in calls), weight))
    return tuple(sorted(tasks, key=lambda task: -task.weight))

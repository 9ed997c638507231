"""What can be switched on or off in the training step, a row each; test_step.py times it beside the step as it is."""

import runpy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.parts import constant_batch, train_step
from bench.suite import Size
from bench.timing import WARM_UP
from fastdiff.nets import fuse
from fastdiff.nets import levers as rules
from fastdiff.runtime import device
from fastdiff.training.step import TrainStep
from kernels import launch


@dataclass(frozen=True)
class Lever:
    """How a step differs from the one that `train_cifar.py` takes by default.

    change    makes a context in which the step is built and takes its first steps, by which all is compiled
    kernels   `triton` or `torch`
    """

    change: Callable[[], AbstractContextManager[Any]] = nullcontext
    kernels: str = "triton"


def with_rules(*rules: fuse.Rule) -> Lever:
    """The network rewritten by these rules."""
    return Lever(partial(mock.patch.object, fuse, "RULES", rules))


def with_tiles(file: Path) -> Lever:
    """The norms in the tiles of a file like kernels/tuned.py."""
    tiles = runpy.run_path(str(file))["NORM_TILES"]
    return Lever(partial(mock.patch.dict, launch.NORM_TILES, tiles, clear=True))


# By name; drop_identities only makes room for the others, as compiled code has no identities.
LEFT_OUT = {getattr(rule, "__name__"): rule for rule in fuse.RULES if rule is not fuse.drop_identities}  # noqa: B009
LEVERS: dict[str, Lever] = {
    "PyTorch's operators": Lever(kernels="torch"),
    "no combo_kernels": Lever(partial(mock.patch.object, device, "compile_options", dict)),
    **{f"no {name}": with_rules(*(r for r in fuse.RULES if r is not rule)) for name, rule in LEFT_OUT.items()},
    **{f"with {name}": with_rules(*fuse.RULES, rule) for name, rule in rules.LEVERS.items()},
}
TUNED = "tuned norms"  # no row: its tiles come from a file


def levers(size: Size) -> dict[str, Lever]:
    """All that can be timed."""
    return LEVERS if size.tiles is None else {TUNED: with_tiles(size.tiles)}


def lever_step(size: Size, name: str, lever: Lever) -> TrainStep:
    """The step with the lever, warm: nothing is left to compile or to capture."""
    with ExitStack() as stack:
        # The caches' keys do not know what was changed: no lever is to find another's code there.
        tag = f"{torch.compiler.config.cache_key_tag} {name} {size.tiles.read_text() if size.tiles else ''}"
        stack.enter_context(mock.patch.object(torch.compiler.config, "cache_key_tag", tag))
        stack.enter_context(lever.change())
        step = train_step(size, kernels=lever.kernels, compile=True, graphs=True)
        batch = constant_batch(size)
        for i in range(WARM_UP):
            step(batch, i)
    return step

"""Sampling by CUDA graphs: one captured step, replayed for every row of a sampler's table."""

import inspect
from collections.abc import Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.loops import OnStep, State, StepFn
from fastdiff.training.graphs import Captured


class GraphLoop:
    """A loop for samplers (see `eager_loop`) that runs each step in fixed buffers, captured in a CUDA graph.

    State, times and table are copied into buffers; a step takes the row at an index that lies on the device too, and
    moves it on. So one graph serves all rows, and all batches of one shape: it is captured once for each body, and
    replayed from there on. On a CPU the same steps run uncaptured in the same buffers.

    A body counts as one seen before if it is the same code and closes over the same numbers, for the same generator
    and shapes: what else it closes over (the network, above all) has to be the same in every call of one GraphLoop. It
    must not close over tensors, which a replay would not follow. The network's weights may change in place.
    """

    def __init__(self) -> None:
        self.steps: dict[Hashable, _FixedStep] = {}
        self.generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: torch.device) -> torch.Generator:
        """The one to seed and draw from in every call: a captured step draws from that which it was captured with."""
        if device not in self.generators:
            self.generators[device] = torch.Generator(device)
        return self.generators[device]

    def __call__(
        self,
        step: StepFn,
        state: State,
        times: Tensor,
        table: Tensor,
        *,
        generator: torch.Generator | None = None,
        on_step: OnStep | None = None,
        first: int = 0,
    ) -> State:
        """The state after the last row, in tensors of its own.

        Raises:
            UserError: a step that cannot be captured.
            ValueError: a step that closes over a tensor.
        """
        assert isinstance(step, FunctionType)
        tensors = (*state, times, table)
        key = (step.__code__, _constants(step), generator, *((v.shape, v.stride(), v.dtype, v.device) for v in tensors))
        if key not in self.steps:
            self.steps[key] = _FixedStep(step, state, times, table, generator)
        return self.steps[key].run(state, times, table, on_step, first)


class _FixedStep:
    """A step over buffers that stay in place."""

    def __init__(
        self, step: StepFn, state: State, times: Tensor, table: Tensor, generator: torch.Generator | None
    ) -> None:
        self.step = step
        self.state = tuple(torch.empty_like(x) for x in state)
        self.x0 = torch.empty_like(state[0])
        self.times, self.table = torch.empty_like(times), torch.empty_like(table)
        self.index = torch.zeros(1, dtype=torch.int64, device=times.device)
        self.call = Captured(
            self._body, device=times.device, capture=times.device.type == "cuda", what="the sampling step",
            generators=[generator] if generator is not None else [],
        )  # fmt: skip

    def _body(self) -> None:
        t, row = self.times.index_select(0, self.index)[0], self.table.index_select(0, self.index)[0]
        state, x0 = self.step(t, row, self.state)
        self.x0.copy_(x0)
        # A multistep sampler hands old members on in other places: these are read before they are written.
        buffers = {x.untyped_storage().data_ptr() for x in self.state}
        state = [x.clone() if x.untyped_storage().data_ptr() in buffers else x for x in state]
        for mine, new in zip(self.state, state, strict=True):
            mine.copy_(new)
        self.index += 1

    def run(self, state: State, times: Tensor, table: Tensor, on_step: OnStep | None, first: int) -> State:
        """As `eager_loop`; on_step sees tensors that the next step overwrites."""
        for mine, given in zip((*self.state, self.times, self.table), (*state, times, table), strict=True):
            mine.copy_(given)
        self.index.zero_()
        for i in range(len(table)):
            x_t = self.state[0].clone() if on_step is not None else None
            self.call()
            if on_step is not None and x_t is not None:
                on_step(first + i, x_t, self.x0)
        return tuple(x.clone() for x in self.state)


def _constants(step: StepFn) -> tuple[Any, ...]:
    """The numbers that a step closes over, by name."""
    outer = inspect.getclosurevars(step).nonlocals
    tensors = [name for name, value in outer.items() if isinstance(value, Tensor)]
    if tensors:
        raise ValueError(f"a sampler's step closes over the tensor {tensors[0]}, which belongs into its state or table")
    return tuple((name, value) for name, value in sorted(outer.items()) if isinstance(value, bool | int | float | str))

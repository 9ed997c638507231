"""Sampling by CUDA graphs: one captured step, replayed for every row of a sampler's plan."""

from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

from fastdiff.diffusion.plan import OnStep, Plan, Rows, noise_like
from fastdiff.runtime.graphs import Captured

Conditions = Mapping[str, Tensor]  # by the names of the denoiser's arguments, each (N, ...)


class GraphLoop:
    """Runs plans of one denoiser in fixed buffers, each kind of step captured once in a CUDA graph and then replayed.

    State, times, table and conditions are copied into buffers. A step reads the row at an index on the device and
    increments the index, so one graph serves all rows, and all batches of one shape. On a CPU the same steps run
    uncaptured in the same buffers.

    A replay sees only what is in the buffers and what changed in place, such as the network's weights. So the loop has
    one fixed denoiser, and whatever may differ between calls is an argument.

    Args:
        denoise: `denoise(x_t, t, **conditions) -> x0_hat`.
        device: where it runs.

    Attributes:
        generator: steps draw from it; seed it before each call.
    """

    def __init__(self, denoise: Callable[..., Tensor], device: torch.device) -> None:
        self.denoise, self.device = denoise, device
        self.generator = torch.Generator(device)
        self.steps: dict[Hashable, _FixedStep] = {}

    def run(
        self, plan: Plan, x_T: Tensor, *, conditions: Conditions | None = None, on_step: OnStep | None = None
    ) -> Tensor:
        """As `plan.run`, in a tensor of its own; on_step sees tensors that the next step overwrites.

        Raises:
            UserError: a step that cannot be captured.
        """
        x, first, given = x_T, 0, dict(conditions or {})
        for rows in plan:
            if len(rows.table) == 0:
                continue
            tensors = (x, rows.times, rows.table, *given.values())
            shapes = tuple((v.shape, v.stride(), v.dtype) for v in tensors)
            key = (rows.step, rows.memory, tuple(given), shapes)
            if key not in self.steps:
                self.steps[key] = _FixedStep(self, rows, x, given)
            x = self.steps[key].run(rows, x, given, on_step, first)
            first += len(rows.table)
        return x


class _FixedStep:
    """A step over buffers that stay in place."""

    def __init__(self, loop: GraphLoop, rows: Rows, x: Tensor, conditions: Conditions) -> None:
        self.loop, self.step = loop, rows.step
        self.state = tuple(torch.empty_like(v) for v in rows.state(x))
        self.x0 = torch.empty_like(x)
        self.times, self.table = (torch.empty_like(v) for v in rows.on(x))
        self.conditions = {name: torch.empty_like(v, device=loop.device) for name, v in conditions.items()}
        self.index = torch.zeros(1, dtype=torch.int64, device=loop.device)
        self.call = Captured(
            self._body, device=loop.device, capture=loop.device.type == "cuda", what="the sampling step",
            generators=[loop.generator],
        )  # fmt: skip

    def _body(self) -> None:
        t, row = self.times.index_select(0, self.index)[0], self.table.index_select(0, self.index)[0]
        state, x0 = self.step(
            lambda x_t, *t: self.loop.denoise(x_t, *t, **self.conditions),
            lambda like: noise_like(like, self.loop.generator), t, row, self.state,
        )  # fmt: skip
        self.x0.copy_(x0)
        # A multistep sampler hands old members on in other places: these are read before they are written.
        buffers = {x.untyped_storage().data_ptr() for x in self.state}
        state = [x.clone() if x.untyped_storage().data_ptr() in buffers else x for x in state]
        for mine, new in zip(self.state, state, strict=True):
            mine.copy_(new)
        self.index += 1

    def run(self, rows: Rows, x: Tensor, conditions: Conditions, on_step: OnStep | None, first: int) -> Tensor:
        for mine, given in zip(
            (*self.state, self.times, self.table, *self.conditions.values()),
            (*rows.state(x), *rows.on(x), *conditions.values()),
            strict=True,
        ):
            mine.copy_(given)
        self.index.zero_()
        for i in range(len(rows.table)):
            x_t = self.state[0].clone() if on_step is not None else self.state[0]
            self.call()
            if on_step is not None:
                on_step(first + i, x_t, self.x0)
        return self.state[0].clone()

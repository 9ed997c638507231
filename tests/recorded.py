"""CUDA graphs without a GPU: a capture notes which operators run on which tensors, and a replay runs them again there.

As in a real graph, numbers that the body takes from the host stay those of the capture, operators whose result or shape
the host would have to wait for and generators that the graph does not know are refused, and the capture itself changes
nothing. Stricter than a real one, whatever the body allocates is overwritten after each replay, also where it is still
held. Not seen: copies between host and device, memory from outside that is freed after the capture (the recording keeps
it), compiled code, and the order of streams, of which only the waits are noted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff.runtime import graphs
from fastdiff.runtime.graphs import Captured

aten = torch.ops.aten
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = (aten.index, aten.index_put, aten.index_put_)  # for which the host waits where masks are given


def tensors(values: Any) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor)]


def place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Stream:
    """Notes whom it waited for."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.waits: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waits.append(other)


class CUDAGraph:
    def __init__(self) -> None:
        self.generators: list[torch.Generator] = []
        self.calls: list[tuple[Callable, tuple, dict, list[tuple[int, Tensor]]]] = []
        self.replays = 0

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for call, args, kwargs, results in self.calls:
            again = tensors(call(*args, **kwargs))
            for i, result in results:
                # Their whole storage, which an expanded result covers only in part.
                result.untyped_storage().copy_(again[i].untyped_storage())
        for *_, results in self.calls:
            for _, result in results:
                result.untyped_storage().fill_(255)  # NaN


class _Recorder(TorchDispatchMode):
    """Runs the operators, notes them in the graph, and keeps what they overwrite."""

    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self.graph = graph
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        indexing = func.overloadpacket in INDEXING
        if any(x.dtype in (torch.bool, torch.uint8) for x in tensors(args[1])) if indexing else WAITS & set(func.tags):
            raise RuntimeError("operation not permitted when stream is capturing")
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata not in {g._cdata for g in self.graph.generators}:
            raise RuntimeError("the generator is not registered with the graph")
        schema = func._schema.arguments
        given = {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
        written = tensors([given.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write])
        for x in written:
            if place(x) not in self.before:
                self.before[place(x)] = x.untyped_storage(), x.untyped_storage().clone()
        results = func(*args, **kwargs)
        old = {place(x) for x in tensors((args, kwargs))}
        new = [(i, x) for i, x in enumerate(tensors(results)) if x.numel() and place(x) not in old]
        if written or new:  # neither: a view
            self.graph.calls.append((func, args, kwargs, new))
        return results

    def undo(self) -> None:
        for storage, before in self.before.values():
            storage.copy_(before)


class RecordedCuda:
    """Stands for the module torch.cuda; what it does not have is the real one's."""

    Stream, CUDAGraph = Stream, CUDAGraph

    def __init__(self, module: ModuleType) -> None:
        self.module, self.capturing, self.now, self.made = module, False, Stream(), []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def current_stream(self, device: torch.device | None = None) -> Stream:
        return self.now

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.now, before = stream, self.now
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph: CUDAGraph, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.made.append(graph)
        generators = [torch.default_generator, *graph.generators]
        states, recorder = [g.get_state() for g in generators], _Recorder(graph)
        self.capturing = True
        try:
            with self.stream(stream), recorder:
                yield
        except Exception:  # as torch.cuda.graph does: the capture's end fails in turn
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        finally:
            self.capturing = False
            recorder.undo()
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def recorded_cuda(monkeypatch: pytest.MonkeyPatch) -> RecordedCuda:
    """Puts it into torch.cuda's place, with a side stream of its own."""
    cuda = RecordedCuda(torch.cuda)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(graphs, "_side_stream", cache(graphs._side_stream.__wrapped__))
    return cuda


def captured(*args: Any, capture: bool, **rest: Any) -> Captured:
    """One that captures on a CPU too."""
    return Captured(*args, capture=True, **rest)

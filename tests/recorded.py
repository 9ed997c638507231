"""CUDA graphs without a GPU: a capture notes which operators run on which tensors, and a replay runs them again there.

What goes wrong in a real replay does so here: numbers that the body takes from the host stay those of the capture, a
read by the host or a generator that the graph does not know is refused, and the capture itself changes nothing. Memory
that the body allocates is the graph's own, and is overwritten after each replay, as later work may use it. Streams and
kernels are not part of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff.training.graphs import Captured

aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2)


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
        if func.overloadpacket in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata not in {g._cdata for g in self.graph.generators}:
            raise RuntimeError("the generator is not registered with the graph")
        schema = func._schema.arguments
        given = {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
        written = tensors([given.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write])
        for x in written:
            self.before.setdefault(place(x), (x.untyped_storage(), x.untyped_storage().clone()))
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
        yield
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
        except BaseException:  # as torch.cuda.graph does: the capture's end fails in turn
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        finally:
            self.capturing = False
            recorder.undo()
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def recorded_cuda(monkeypatch: pytest.MonkeyPatch) -> RecordedCuda:
    """Puts it into torch.cuda's place."""
    cuda = RecordedCuda(torch.cuda)
    monkeypatch.setattr(torch, "cuda", cuda)
    return cuda


def captured(*args: Any, capture: bool, **rest: Any) -> Captured:
    """One that captures on a CPU too."""
    return Captured(*args, capture=True, **rest)

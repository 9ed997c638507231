"""CUDA graphs: work on fixed tensors, recorded once and then replayed by one call of the host.

A replay runs the recorded kernels on the recorded addresses. What changes from call to call is therefore written into
tensors that stay where they are: inputs, learning rate, decay, step number. Random numbers come from generators that
the graph knows: a replay starts from the seed and offset that a generator has at that moment and moves its offset on,
so it draws what the same work would draw uncaptured.
"""

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor
from torch.profiler import record_function

from fastdiff.errors import UserError

WARMUP = 3  # calls before the capture, which compile, allocate, and let cuDNN choose its algorithms


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """For warm-up and capture of all graphs: autograd remembers the stream on which it first saw a weight, and cuBLAS
    keeps a workspace (32 MiB on an H200) for every stream that it has seen."""
    return torch.cuda.Stream(device)


class Captured:
    """Calls `body()` as it is for WARMUP times, then captures it in a CUDA graph and replays that.

    Every call does the body's work exactly once: the first ones are no rehearsals, and the one that captures replays
    what it captured. Calls are ordered with the work on the current stream. Without `capture` every call is `body()`.

    Args:
        body: the work, the same in every call: it reads and writes tensors that stay in place, and neither reads a
            value of the device nor counts anything on the host.
        device: where it runs.
        capture: False for a CPU, or to do without.
        what: the work's name in errors.
        generators: those that it draws from, other than the device's own.
    """

    def __init__(
        self,
        body: Callable[[], None],
        *,
        device: torch.device,
        capture: bool,
        what: str,
        generators: Iterable[torch.Generator] = (),
    ) -> None:
        self.body, self.capture, self.what, self.generators = body, capture, what, tuple(generators)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = _side_stream(device) if capture else None

    @property
    def ready(self) -> bool:
        """Whether the next call is like all that follow: nothing left to compile or to capture."""
        return self.calls > (WARMUP if self.capture else 0)

    def __call__(self) -> None:
        """Do the work once.

        Raises:
            UserError: it cannot be captured.
            torch.OutOfMemoryError: the device's memory does not suffice for it.
        """
        if self.stream is None:
            self.body()
        elif self.calls < WARMUP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.body()
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.graph is None:
                self.graph = self._capture(self.stream)
            with record_function("replay"):
                self.graph.replay()
        self.calls += 1

    def _capture(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        try:
            # thread_local: a loader's own threads go on allocating and copying meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.body()
        except Exception as error:
            # Ending the capture of a body that failed raises an error of its own, which tells nothing.
            cause: BaseException = error
            while cause.__context__ is not None:
                cause = cause.__context__
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
            raise UserError(f"{self.what} cannot be captured in a CUDA graph ({reason}); use --no-graphs.") from error
        return graph


class CapturedFunction:
    """A function of one tensor, captured for each shape that it is called with, in autocast or not; its results are
    tensors of their own.

    Arguments are as of `Captured`.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], *, device: torch.device, capture: bool, what: str) -> None:
        self.function, self.device, self.capture, self.what = function, device, capture, what
        self.calls: dict[tuple, tuple[Tensor, list[Tensor], Captured]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Raises UserError if it cannot be captured."""
        if not self.capture:
            return self.function(x)
        key = (x.shape, x.stride(), x.dtype, torch.is_autocast_enabled(x.device.type))
        if key not in self.calls:
            given, result = torch.empty_like(x), list[Tensor]()

            def body() -> None:
                y = self.function(given)
                if not result:  # in the first call, which is not captured
                    result.append(torch.empty_like(y))
                result[0].copy_(y)

            call = Captured(body, device=self.device, capture=self.device.type == "cuda", what=self.what)
            self.calls[key] = given, result, call
        given, result, call = self.calls[key]
        given.copy_(x)
        call()
        return result[0].clone()

"""Where the time of a step goes, from a chrome trace that torch.profiler wrote.

A trace becomes plain `Event` rows, and these a `Profile`. On a GPU the kernels on its streams are what is counted, and
idle is the time in which none runs. On a CPU it is every op's exclusive time (without the ops inside it), and idle is
the time outside of all ops: Python, and waiting. Either way the categories and idle add up to the step.
"""

import gzip
import inspect
import json
import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastdiff._kernels import REGISTRY, KernelSpec
from fastdiff.errors import UserError

STEP, DRAIN = "ProfilerStep#", "profiler drain"  # torch's own range around a step; ours around the last wait
RANGES = ("data", "forward", "backward", "all-reduce", "optimizer", "ema", "sampling")
CATEGORIES = ("conv", "norm", "attention", "matmul", "pointwise", "optimizer", "data", "copy", "other", "idle")
RANGE_CATEGORY = {"data": "data", "optimizer": "optimizer", "ema": "optimizer"}  # of all inside


def _kernels(spec: KernelSpec) -> list[str]:
    return sorted({job.name for job in spec.jobs()})


def _ours() -> Iterator[tuple[str, str]]:
    """Operators of ours and their Triton kernels, to which Inductor adds a number."""
    for spec in REGISTRY.values():
        operator = rf"^fastdiff_kernels::{spec.operator}"
        yield spec.category, "|".join([operator, *(rf"^{name}(_\d+)?$" for name in _kernels(spec))])


# The first pattern found in a name decides. `other` is what moves no data: views, allocations.
RULES: tuple[tuple[str, str], ...] = (
    *_ours(),
    # Inductor: templates compute what they are named for; fused kernels around a convolution only its bias.
    ("conv", r"^triton_tem\w*conv"),
    ("attention", r"^triton_tem\w*(flex|attention|sdpa)"),
    ("matmul", r"^triton_tem|^extern_kernels\.(mm|addmm|bmm|baddbmm)"),
    ("optimizer", r"^triton_for_"),
    ("norm", r"^(triton|cpp)_\w*(group_norm|layer_norm|var_mean)"),
    ("attention", r"^(triton|cpp)_\w*(softmax|attention)"),
    ("pointwise", r"^triton_(poi|red|per)_|^cpp_fused"),
    ("optimizer", r"multi_tensor|_foreach_|fused_?adam"),
    ("norm", r"group_?norm|batch_?norm|layer_?norm"),
    ("norm", r"RowwiseMoments|Compute(Internal|Backward|Fused)\w*(Gradients|Params)|GammaBeta"),
    ("attention", r"flash|fmha|sdpa|scaled_?dot_?product|softmax|attention"),
    ("data", r"\bdali"),
    ("copy", r"memcpy|memset|nchwtonhwc|nhwctonchw|CatArray|copy_kernel|copy_device|FillFunctor"),
    ("copy", r"^aten::(copy_|_to_copy|to|contiguous|clone|cat|fill_|zero_|zeros|ones|zeros_like|ones_like)$"),
    ("conv", r"conv(?!ert)|[fdw](prop|grad)_|\w(fprop|dgrad|wgrad)|winograd|cudnn"),
    ("matmul", r"gemm|gemv|nvjet|cublas|splitk|^aten::(mm|bmm|addmm|baddbmm|linear|matmul)$|Addmm|\b[MB]mmBackward"),
    (
        "other",
        r"^aten::(empty|as_strided|view|_?reshape|expand|permute|transpose|t$|select|slice|narrow|resize|unbind|split"
        r"|chunk|alias|detach|squeeze|unsqueeze|item|_local_scalar|set_|result_type|is_|new_empty|lift|_unsafe_view)",
    ),
    ("pointwise", r"elementwise|reduce_kernel|distribution|indexSelect|index_|^aten::|Backward\d|upsample"),
)

LAUNCHES = re.compile(r"^(cuda|cu)(LaunchKernel|LaunchCooperativeKernel|GraphLaunch|Memcpy|Memset)")
SYNCS = re.compile(r"^(cuda|cu)((Device|Ctx|Stream|Event)Synchronize|Memcpy(?!\w*Async)|MemcpyDtoH(?!Async))")
HOST_READ = "aten::_local_scalar_dense"  # what .item(), float(tensor) and `if tensor` end in; on a GPU it waits
SIZES = {
    **{"float": 4, "double": 8, "long int": 8, "long": 8, "int": 4, "short": 2, "unsigned char": 1, "signed char": 1},
    **{"bool": 1, "c10::BFloat16": 2, "c10::Half": 2},
}
# Element by element: the inputs are read and one output, as large as the largest of them, is written.
ELEMENTWISE = re.compile(
    r"^aten::(add|sub|mul|div|neg|silu|sigmoid|exp|sqrt|lerp|addcmul|addcdiv|clamp|silu_backward|sigmoid_backward)_?$"
)
OUR_KERNELS = re.compile("^triton_|" + "|".join(f"^{name}" for spec in REGISTRY.values() for name in _kernels(spec)))


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a trace. Times are microseconds; only `memory` has start = end.

    Args:
        kind: `op` (CPU op), `range` (record_function), `runtime` (CUDA call on the host), `kernel` (anything that
            a GPU stream does, copies too) or `memory` (an allocation).
        lane: thread of an op, range or runtime call; stream of a kernel.
        correlation: joins a kernel to the runtime call that launched it; -1 for none.
        op: joins kernels and runtime calls to the op that they are part of; -1 for none.
        shapes, types: of an op's inputs, if they were recorded.
        bytes: moved by a copy; the bytes allocated in all after a `memory` event.
        cuda: of `memory`: the GPU's memory, not the host's.
    """

    kind: Literal["op", "range", "runtime", "kernel", "memory"]
    name: str
    start: float
    end: float
    lane: int | str = 0
    correlation: int = -1
    op: int = -1
    shapes: Sequence[Any] = ()
    types: Sequence[str] = ()
    bytes: int = 0
    cuda: bool = False


@dataclass(frozen=True)
class KernelRow:
    """All calls of one kernel, or of one CPU op: times in microseconds a step; bandwidth where bytes are known."""

    name: str
    category: str
    calls: float
    time: float
    bytes_per_second: float | None


@dataclass(frozen=True)
class Profile:
    """What a trace says of a step. Times are microseconds a step, counts are a step.

    Args:
        steps: recorded.
        step: wall time, under the profiler.
        categories: time of each of CATEGORIES; they add up to `step`.
        ranges: for each of RANGES that is there: wall time on the host, and time of the kernels launched in it.
        launches: CUDA calls that start work (kernels, graphs, copies); on a CPU, ops called by no other op.
        kernels: kernels and copies that ran; on a CPU, all ops.
        syncs: calls in which the host waits for the GPU; on a CPU, values that the host reads.
        memory: the peak of the timeline in bytes; on a CPU above what was allocated before. None without a timeline.
    """

    gpu: bool
    steps: int
    step: float
    categories: dict[str, float]
    rows: list[KernelRow]
    ranges: dict[str, tuple[float, float]]
    launches: float
    kernels: float
    syncs: float
    memory: int | None


def classify(name: str) -> str | None:
    """The category of a kernel or CPU op by its name; None for a name that no rule knows."""
    return next((category for category, pattern in RULES if re.search(pattern, name, re.IGNORECASE)), None)


def read_trace(path: Path | str) -> list[Event]:
    """The rows of a chrome trace (.json or .json.gz) of torch.profiler. Raises UserError for another file."""
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        found = json.loads(data)["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{path} is no chrome trace ({error}); give a trace.json.gz of torch.profiler.") from error
    return [event for raw in found if (event := _event(raw)) is not None]


_KINDS: dict[str, Literal["op", "range", "runtime", "kernel"]] = {
    **{"cpu_op": "op", "user_annotation": "range", "cuda_runtime": "runtime", "cuda_driver": "runtime"},
    **{"kernel": "kernel", "gpu_memcpy": "kernel", "gpu_memset": "kernel"},
}


def _event(raw: dict[str, Any]) -> Event | None:
    args = raw.get("args", {})
    if raw.get("name") == "[memory]":
        cuda = args["Device Type"] != 0
        return Event("memory", "[memory]", raw["ts"], raw["ts"], raw["tid"], bytes=args["Total Allocated"], cuda=cuda)
    kind = _KINDS.get(raw.get("cat", ""))
    if kind is None or raw.get("ph") != "X":
        return None
    return Event(
        kind, raw["name"], raw["ts"], raw["ts"] + raw["dur"], args.get("stream", raw["tid"]),
        args.get("correlation", -1), args.get("External id", -1), args.get("Input Dims", ()),
        args.get("Input type", ()), args.get("bytes", 0),
    )  # fmt: skip


def analyse(events: Iterable[Event]) -> Profile:
    """Sum up the steps of a trace. Raises UserError where no step or no work was recorded."""
    by_kind: dict[str, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        by_kind[event.kind].append(event)
    steps = [e for e in by_kind["range"] if e.name.startswith(STEP)]
    if not steps or not (by_kind["op"] or by_kind["kernel"]):
        raise UserError("the trace has no step in it; record it with a schedule, as profiles/capture.py does.")
    begin, end, n = steps[0].start, max(e.end for e in steps), len(steps)

    def inside(kind: str) -> list[Event]:
        return [e for e in by_kind[kind] if begin <= e.start < end]

    ranges = _Ranges(inside("range"), thread=steps[0].lane)
    ops = [e for e in inside("op") if e.lane == steps[0].lane]  # the autograd of CPU tensors stays in this thread
    runtime = [e for e in inside("runtime") if not ranges.within(DRAIN, e.start)]
    gpu = bool(by_kind["kernel"])
    launched = {e.correlation: e.start for e in by_kind["runtime"]}
    if gpu:
        kernels = [e for e in by_kind["kernel"] if e.end > begin and e.start < end]
        place = [ranges.at(launched.get(e.correlation, -1.0)) for e in kernels]
        names = [_category(e.name, r) for e, r in zip(kernels, place, strict=True)]
        shares = shared_time(kernels, begin, end)
        lasted = [e.end - e.start for e in kernels]
        moved = _kernel_bytes(kernels, by_kind["op"])
        launches = sum(bool(LAUNCHES.match(e.name)) for e in runtime)
        syncs = sum(bool(SYNCS.match(e.name)) for e in runtime)
    else:
        kernels = ops
        shares, parents = self_time(ops, end)
        lasted = shares
        place = [ranges.at(e.start) for e in ops]
        names = _op_categories(ops, parents, place)
        moved = [op_bytes(e) for e in ops]
        launches, syncs = parents.count(-1), sum(e.name == HOST_READ for e in ops)
    device = _sums(place, shares, n)
    categories = {**dict.fromkeys(CATEGORIES, 0.0), **_sums(names, shares, n)}
    categories["idle"] = (end - begin - sum(shares)) / n
    memory = [e for e in by_kind["memory"] if e.cuda == gpu and e.start < end]
    return Profile(
        gpu=gpu,
        steps=n,
        step=(end - begin) / n,
        categories=categories,
        rows=_rows(kernels, names, lasted, moved, n),
        ranges={name: (ranges.wall(name) / n, device[name]) for name in RANGES if ranges.wall(name)},
        launches=launches / n,
        kernels=len(kernels) / n,
        syncs=syncs / n,
        memory=_timeline_peak(memory, begin, gpu),
    )


class _Ranges:
    """The named ranges of the thread that takes the steps; what other threads do is placed by its time."""

    def __init__(self, events: list[Event], *, thread: int | str) -> None:
        self.events = [e for e in events if e.lane == thread]
        self.times, self.names = [float("-inf")], [""]  # from each time on, until the next, the innermost range's name
        open_: list[Event] = []
        named = [e for e in self.events if e.name in RANGES and e.start < e.end]
        edges = [(e.start, 1, i) for i, e in enumerate(named)] + [(e.end, 0, i) for i, e in enumerate(named)]
        for time, starts, i in sorted(edges):
            open_.append(named[i]) if starts else open_.remove(named[i])
            self.times.append(time)
            self.names.append(open_[-1].name if open_ else "")

    def at(self, time: float) -> str:
        """The innermost of RANGES around `time`, or an empty string."""
        return self.names[bisect_right(self.times, time) - 1]

    def within(self, name: str, time: float) -> bool:
        return any(e.name == name and e.start <= time < e.end for e in self.events)

    def wall(self, name: str) -> float:
        return sum(e.end - e.start for e in self.events if e.name == name)


def shared_time(events: Sequence[Event], begin: float, end: float) -> list[float]:
    """The time of each event between begin and end; where k of them overlap, each gets 1/k, so that all sum to busy."""
    clipped = [(max(e.start, begin), min(e.end, end), i) for i, e in enumerate(events)]
    edges = [edge for start, stop, i in clipped if start < stop for edge in ((start, 1, i), (stop, 0, i))]
    shares, running, last = [0.0] * len(events), set[int](), begin
    for time, starts, i in sorted(edges):
        for j in running:
            shares[j] += (time - last) / len(running)
        last = time
        running.add(i) if starts else running.discard(i)
    return shares


def self_time(ops: Sequence[Event], end: float) -> tuple[list[float], list[int]]:
    """For ops of one thread, by start: the time of each without the ops inside it; the index of its parent or -1."""
    times, parents, stack = [0.0] * len(ops), [-1] * len(ops), list[int]()
    for i, e in enumerate(ops):
        while stack and ops[stack[-1]].end <= e.start:
            stack.pop()
        duration = min(e.end, end) - e.start
        if stack:
            parents[i] = stack[-1]
            duration = min(duration, ops[stack[-1]].end - e.start)
            times[stack[-1]] -= duration
        times[i] += duration
        stack.append(i)
    return times, parents


def _category(name: str, place: str) -> str:
    return RANGE_CATEGORY.get(place) or classify(name) or "other"


def _op_categories(ops: Sequence[Event], parents: Sequence[int], place: Sequence[str]) -> list[str]:
    """Parts of a norm, of attention or of the optimizer count as it; views and allocations count as what they serve."""
    names: list[str] = []
    for e, parent, r in zip(ops, parents, place, strict=True):
        own, outer = _category(e.name, r), names[parent] if parent >= 0 else None
        names.append(outer if outer and (own == "other" or outer in ("norm", "attention", "optimizer")) else own)
    return names


def _sums(names: Sequence[str], shares: Sequence[float], n: int) -> dict[str, float]:
    """Each name's time in a step."""
    total: dict[str, float] = defaultdict(float)
    for name, share in zip(names, shares, strict=True):
        total[name] += share / n
    return total


def _rows(
    events: Sequence[Event], names: Sequence[str], lasted: Sequence[float], moved: Sequence[int | None], n: int
) -> list[KernelRow]:
    groups: dict[tuple[str, str], list[tuple[Event, float, int | None]]] = defaultdict(list)
    for e, category, time, size in zip(events, names, lasted, moved, strict=True):
        groups[e.name, category].append((e, time, size))
    rows = []
    for (name, category), calls in groups.items():
        known = [(e.end - e.start, size) for e, _, size in calls if size]  # with the ops inside: they move the bytes
        seconds = sum(whole for whole, _ in known) / 1e6
        bandwidth = sum(size for _, size in known) / seconds if seconds > 0 else None
        rows.append(KernelRow(name, category, len(calls) / n, sum(time for _, time, _ in calls) / n, bandwidth))
    return sorted(rows, key=lambda row: -row.time)


def _kernel_bytes(kernels: Sequence[Event], ops: Sequence[Event]) -> list[int | None]:
    """A copy's own count; else what the launching op must move, credited to the longest of the kernels it launched."""
    by_id = {e.op: e for e in ops}
    longest = {e.op: e for e in sorted(kernels, key=lambda e: e.end - e.start)}  # the last of each op counts
    return [
        e.bytes or (op_bytes(by_id[e.op]) if e.op in by_id and longest[e.op] is e else None) or None for e in kernels
    ]


def op_bytes(op: Event) -> int | None:
    """The bytes that an op must move, from its recorded inputs, where that is known; else None.

    Triton kernels read or write each of their arguments once (at least: some do both in place); our custom ops move
    what their SPEC says.
    """
    sizes = [_nbytes(shape, kind) for shape, kind in zip(op.shapes, op.types, strict=False)]
    if not any(sizes):
        return None
    if op.name.startswith("fastdiff_kernels::"):
        return _spec_bytes(op)
    if OUR_KERNELS.match(op.name) or op.name == "aten::copy_":
        return sum(sizes)
    return sum(sizes) + max(sizes) if ELEMENTWISE.match(op.name) else None


def _nbytes(shape: Any, kind: str) -> int:
    if kind not in SIZES or any(isinstance(side, list) for side in shape):
        return 0
    return math.prod(shape) * SIZES[kind]


def _spec_bytes(op: Event) -> int | None:
    import torch  # here: reading a trace of anything else needs neither torch nor Triton

    base = op.name.split("::")[1]
    spec = REGISTRY.get(base.removesuffix("_backward").rstrip("_"))
    if spec is None:
        return None
    dtypes = {"float": "float32", "double": "float64", "c10::BFloat16": "bfloat16", "c10::Half": "float16"}
    schema = getattr(torch.ops.fastdiff_kernels, base).default._schema
    wanted = inspect.signature(spec.op).parameters
    inputs: dict[str, Any] = {}
    for argument, shape, kind in zip(schema.arguments, op.shapes, op.types, strict=False):
        if argument.name in wanted:
            dtype = getattr(torch, dtypes.get(kind, "int64"))
            inputs[argument.name] = torch.empty(shape, dtype=dtype, device="meta") if kind in SIZES else None
    return spec.min_bytes(inputs)[1 if base.endswith("_backward") else 0]


def _timeline_peak(memory: Sequence[Event], begin: float, gpu: bool) -> int | None:
    """The most bytes allocated within the steps; on a CPU, where only changes are known, above what was before."""
    within = [e.bytes for e in memory if e.start >= begin]
    if not within:
        return None
    before = [0, *(e.bytes for e in memory if e.start < begin)]
    return max(within) - (0 if gpu else before[-1])

"""Every kernel with a SPEC: its reference eager and compiled, ours, and a device copy of the same bytes.

On a CPU our operators run their reference, which is measured once, as `eager`.
"""

from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch._functorch.config
from torch import Tensor

from bench.suite import Against, Comparison, Size, to_device
from bench.timing import Workload, rotations
from kernels import REGISTRY
from kernels.spec import Case, Inputs, KernelSpec

COPY = "device copy"
PASSES = ("forward", "backward", "both")


def _norm(n: int, c: int, side: int, groups: int, *, extras: bool = False) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        x = torch.randn(n, c, side, side, generator=generator).to(dtype).to(memory_format=torch.channels_last)
        inputs: Inputs = {"x": x, "weight": torch.ones(c), "bias": torch.zeros(c), "num_groups": groups, "eps": 1e-6}
        if extras:
            shift = torch.randn(n, c, generator=generator).to(dtype)
            inputs |= {"shift": shift, "dropout_p": 0.1, "seed": torch.tensor([1], dtype=torch.int64)}
        return inputs

    return Case(f"{n}x{c}x{side}x{side}" + (" shift+dropout" if extras else ""), make)


def _norms(size: Size) -> Iterator[Case]:
    groups = size.config.net.norm_groups
    yield from (_norm(*shape, groups) for shape in size.norms)
    yield _norm(*size.norms[len(size.norms) // 2], groups, extras=True)  # the second norm of a block, while training


def _sums(size: Size) -> Iterator[Case]:
    """What the first norm of a block reads: on the way down a residual and a bias, on the way up a skip too."""

    def case(n: int, c: int, side: int, c_skip: int) -> Case:
        def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
            def image(channels: int) -> Tensor:
                x = torch.randn(n, channels, side, side, generator=generator)
                return x.to(dtype).to(memory_format=torch.channels_last)

            inputs: Inputs = {"x": image(c - c_skip), "weight": torch.ones(c), "bias": torch.zeros(c)}
            inputs |= {"num_groups": size.config.net.norm_groups, "eps": 1e-6, "residual": image(c - c_skip)}
            return inputs | ({"skip": image(c_skip)} if c_skip else {}) | {"shift": torch.randn(c - c_skip)}

        return Case(f"{n}x{c}x{side}x{side}" + (f", {c_skip} of a skip" if c_skip else ""), make)

    for n, c, side in (size.norms[0], size.norms[len(size.norms) // 2]):
        yield case(n, c, side, 0)
    n, c, side = max(size.norms, key=lambda norm: norm[1] * norm[2])
    yield case(n, c, side, c // 3 // 8 * 8)


def _merge(size: Size) -> Iterator[Case]:
    net = size.config.net
    side = max(net.attention_resolutions)
    shape = (size.norms[0][0], 1, side**2, net.channels * net.channel_mult[-1])

    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        return {name: torch.randn(shape, generator=generator).to(dtype) for name in "abc"}

    yield Case("x".join(map(str, shape)), make)


def _upsampling(size: Size) -> Iterator[Case]:
    """To the full resolution, where most of the time of all upsamplings goes."""
    net, n = size.config.net, size.norms[0][0]
    channels, side = net.channels * net.channel_mult[min(1, len(net.channel_mult) - 1)], net.image_size // 2

    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        shapes = {"x": (n, channels, side, side), "weight": (channels, channels, 3, 3)}
        drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        return {name: v.to(memory_format=torch.channels_last) for name, v in drawn.items()}

    yield Case(f"{n}x{channels}x{side}x{side}", make)


def _ema(size: Size) -> Iterator[Case]:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        ema, params = torch.randn(2, size.flat, generator=generator).unbind()
        return {"ema": ema, "params": params, "decay": torch.tensor(0.9999, dtype=torch.float64)}

    yield Case(f"n={size.flat}", make)


def _adam_ema(size: Size) -> Iterator[Case]:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        param, grad, exp_avg, exp_avg_sq, ema = torch.randn(5, size.flat, generator=generator).unbind()
        inputs: Inputs = {"param": param, "grad": grad.to(dtype), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq.square()}
        inputs |= {"ema": ema, "half": param.to(dtype) if size.bf16 else None, "step": torch.tensor(100)}
        scalars = {"lr": 2e-4, "decay": 0.9999, "clip": 0.7}
        return inputs | {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()}

    yield Case(f"n={size.flat}", make)


# The cases of a training run; a SPEC's own cases are chosen for correctness, not for speed.
CASES: dict[str, Callable[[Size], Iterator[Case]]] = {
    "group_norm_silu": _norms,
    "add_group_norm_silu": _sums,
    "merge_columns": _merge,
    "upsample_conv": _upsampling,
    "ema_update": _ema,
    "adam_ema": _adam_ema,
}
BARS = {
    ("group_norm_silu", "forward"): "8 forward",
    ("group_norm_silu", "backward"): "8 backward",
    ("ema_update", "forward"): "9",
}


def _leaves(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in spec.differentiable if isinstance(inputs.get(name), Tensor)]


def _work(
    spec: KernelSpec, fn: Callable, inputs: Inputs, which: str, copies: int, moved: int, device: torch.device
) -> Workload:
    """Inputs go round, and so do outputs, as the copy's do: the last `copies` are alive, so none is still in the cache
    when its memory is written again."""
    sets = [to_device(inputs, device) for _ in range(copies)]
    alive: deque[object] = deque(maxlen=copies)
    if not spec.differentiable:  # in place, or without gradients
        return Workload(lambda i: alive.append(fn(**sets[i % copies])), bytes=moved)
    leaves = [_leaves(spec, s) for s in sets]

    def outputs(i: int) -> tuple[Tensor, ...]:
        result = fn(**sets[i % copies])
        return result if isinstance(result, tuple) else (result,)

    weights = [[torch.randn_like(y.detach()) for y in outputs(i)] for i in range(copies)]
    if which == "forward":  # as in training: with what the backward will need
        return Workload(lambda i: alive.append([y.detach() for y in outputs(i)]), bytes=moved)
    if which == "both":

        def both(i: int) -> None:
            ys = outputs(i)
            gradients = torch.autograd.grad(ys, leaves[i % copies], weights[i % copies])
            alive.append(([y.detach() for y in ys], gradients))

        return Workload(both, bytes=moved)
    # A compiled backward may write into what the forward saved unless it is told that it will run again.
    with torch._functorch.config.patch(donated_buffer=False):
        saved = [outputs(i) for i in range(copies)]

    def backward(i: int) -> None:
        alive.append(torch.autograd.grad(saved[i % copies], leaves[i % copies], weights[i % copies], retain_graph=True))

    return Workload(backward, bytes=moved)


def _copy(moved: int, copies: int, device: torch.device) -> Workload:
    """Half of the bytes are read and half written."""
    n = -(-moved // 2 // 16) * 16  # bytes, in whole vectors
    pairs = [[torch.ones(n, dtype=torch.uint8, device=device) for _ in range(2)] for _ in range(copies)]

    def copy(i: int) -> None:
        target, source = pairs[i % copies]
        target.copy_(source)

    return Workload(copy, bytes=2 * n)


def _comparison(size: Size, spec: KernelSpec, case: Case, which: str) -> Comparison:
    mine = ("ours",) if size.ours else ()
    variants = ("eager", "torch.compile", *mine, COPY)
    copy = Against(COPY, "lower", BARS.get((spec.name, which)))
    ratios = {"torch.compile": (Against("eager", "higher"),)}
    ratios["ours"] = (copy, Against("torch.compile", "higher"), Against("eager", "higher"))

    def build() -> dict[str, Workload]:
        inputs = case.make(size.dtype, torch.Generator().manual_seed(0))
        forward, backward = spec.min_bytes(inputs)
        moved = {"forward": forward, "backward": backward, "both": forward + backward}[which]
        copies = rotations(moved, size.device)
        functions = {
            "eager": spec.reference,
            "torch.compile": torch.compile(spec.reference, dynamic=False),
            "ours": spec.op,
        }
        work = {
            name: _work(spec, fn, inputs, which, copies, moved, size.device)
            for name, fn in functions.items()
            if name in variants
        }
        return work | {COPY: _copy(moved, copies, size.device)}

    suffix = f" {which}" if spec.differentiable else ""
    return Comparison("kernels", f"{spec.name} {case.name}{suffix}", variants, build, ratios, queued=True)


def comparisons(size: Size) -> list[Comparison]:
    """Each SPEC on each case; those with gradients in three passes, on a CPU (which has no bars) in one."""
    if missing := set(REGISTRY) - set(CASES):
        raise ValueError(f"no benchmark cases for the kernels {missing}: add them to CASES in bench/test_kernels.py")
    passes = PASSES if size.ours else ("both",)
    return [
        _comparison(size, spec, case, which)
        for name, spec in REGISTRY.items()
        for case in CASES[name](size)
        for which in (passes if spec.differentiable else PASSES[:1])
    ]


def test_kernels(record):
    record()

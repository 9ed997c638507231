"""The training step in variants, and what Inductor's code for an H100 asks for in each: bytes and launches."""

from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench import inductor_mock
from bench.inductor_mock import Call
from fastdiff.diffusion.objectives import make_objective
from fastdiff.model_sections import UNetConfig
from fastdiff.nets.fuse import RULES, Rule, fuse, half_parameters
from fastdiff.nets.text import READERS, byte_ids
from fastdiff.nets.unet import UNet
from fastdiff.runtime.device import compile_options
from fastdiff.training.ema import EMA
from fastdiff.training.optim import LearningRate, make_update
from fastdiff.training.step import TrainStep
from kernels import add_group_norm_silu, group_norm_silu

Variant = Literal["stock", "stock-nchw", "plain", "ours"]
VARIANTS: dict[Variant, str] = {
    "stock": "F.group_norm + SiLU, channels_last",
    "stock-nchw": "the same, left in NCHW",
    "plain": "GroupNorm in plain PyTorch, over NHWC views",
    "ours": "the kernel and the optimizer's bf16 weight copies",
}
# Of commit b026f01: the H200's profile has 984 kernels and copies a step, where 319 launches of Triton kernels and 249
# library calls were counted. What the update, the random numbers and the metrics start is in the ratio too.
KERNELS_A_LIBRARY_CALL = (984 - 319) / 249
# A network in which every kind of layer occurs, for tests: the fewest blocks that two levels can have.
SMALL = UNetConfig(image_size=16, channels=64, channel_mult=(1, 1), blocks_per_level=1, attention_resolutions=())


def plain_group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """GroupNorm as one writes it for Inductor: reductions over (N, HW, groups, C / groups) views."""
    n, c, height, width = x.shape
    u = x.permute(0, 2, 3, 1).reshape(n, height * width, norm.num_groups, c // norm.num_groups).float()
    variance, mean = torch.var_mean(u, (1, 3), correction=0, keepdim=True)
    scale = torch.rsqrt(variance + norm.eps)
    y = (u - mean) * scale * norm.weight.reshape(norm.num_groups, -1) + norm.bias.reshape(norm.num_groups, -1)
    return y.to(x.dtype).reshape(n, height, width, c).permute(0, 3, 1, 2)


@contextmanager
def norms_of(variant: Variant) -> Generator[None]:
    """The plain norm in place of PyTorch's, for that baseline."""
    if variant != "plain":
        yield
        return
    with mock.patch.object(nn.GroupNorm, "forward", plain_group_norm):
        yield


@dataclass(frozen=True)
class Counts:
    """What one variant does in a step. Bytes are per image.

    forward, backward    MB an image
    triton, calls        launches of Triton kernels; with library calls (convolution, matrix product, attention)
    norm                 bytes an element of the norms alone, forward and backward, all of the network's shapes
    optimizer_calls      operators of the weights' update; optimizer_launches: kernels they start (see `launches`)
    optimizer            MB an image that these move (see `moved`)
    top                  the largest contributors: (pass, kind, what, calls, MB an image)
    """

    forward: float
    backward: float
    triton: int
    calls: int
    norm: tuple[float, float]
    optimizer_calls: int
    optimizer_launches: int
    optimizer: float
    kinds: dict[str, int] = field(default_factory=dict)
    top: list[list[Any]] = field(default_factory=list)

    @property
    def total(self) -> float:
        """MB an image of the whole step."""
        return self.forward + self.backward + self.optimizer

    @property
    def kernels(self) -> float:
        """A guess of the kernels that a step starts on a GPU."""
        return self.triton + (self.calls - self.triton) * KERNELS_A_LIBRARY_CALL

    @property
    def inductor(self) -> int:
        """Launches of the Triton kernels that Inductor writes; ours, which replace several each, are not among them."""
        return self.triton - sum(n for kind, n in self.kinds.items() if kind.endswith(" user"))


def make_step(variant: Variant, config: UNetConfig, rules: Sequence[Rule] = RULES) -> TrainStep:
    """The project's own training step with this variant's switches; ours with these rules of `fuse`."""
    ours = variant == "ours"
    model = UNet(config)
    network = fuse(model, rules) if ours else model
    objective = make_objective("eps", schedule="ddpm-linear")
    update = make_update(
        "triton" if ours else "torch", model, EMA(model, 0.9999), weight_decay=0.0, half=half_parameters(network)
    )
    return TrainStep(network, objective, update, lr=LearningRate(2e-4), grad_clip=1.0, seed=0, bf16=True, compile=False)


def graphs_of(
    variant: Variant, config: UNetConfig, batch: int, rules: Sequence[Rule] = RULES
) -> list[inductor_mock.Graph]:
    """Inductor's forward and backward of the loss, as TrainStep differentiates it; ours compiled as it compiles."""
    step = make_step(variant, config, rules)
    names, n = list(step.update.weights), len(step.update.weights)
    weights: list[Tensor] = [w.detach().requires_grad_() for w in step.update.weights.values()]
    side, channels = config.image_size, config.image_channels
    images = torch.empty(batch, side, side, channels, dtype=torch.uint8)
    eps = torch.empty(batch, side, side, channels).permute(0, 3, 1, 2)
    if variant == "stock-nchw":
        weights = [w.detach().contiguous().requires_grad_() for w in weights]
        images = torch.empty(batch, channels, side, side, dtype=torch.uint8).permute(0, 2, 3, 1)
        eps = eps.contiguous()
    t = torch.ones(batch, dtype=torch.int64)

    told: dict[str, Tensor] = {}
    if config.num_classes:
        told["labels"] = torch.zeros(batch, dtype=torch.int64)
    if config.text_encoder in READERS:
        told["text"] = byte_ids(["a"] * batch)

    def loss(*args: Tensor) -> Tensor:
        step.update.weights = dict(zip(names, args[:n], strict=True))
        mean, _ = step.loss(*args[n : n + 3], **dict(zip(told, args[n + 3 :], strict=True)))
        return mean

    inputs = [*weights, images, t, eps, *told.values()]
    with norms_of(variant):
        return inductor_mock.count(loss, inputs, compile_options() if variant == "ours" else None)


def norm_shapes(config: UNetConfig) -> Counter[tuple[int, int, bool, bool]]:
    """How often the fused network applies a norm to (channels, side, SiLU, shift); shifts within sums do not count."""
    seen: Counter[tuple[int, int, bool, bool]] = Counter()

    class Norms(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target in (group_norm_silu, add_group_norm_silu):
                shifted = target is group_norm_silu and kwargs["shift"] is not None
                seen[len(args[1]), args[0].shape[2], kwargs["activation"] == "silu", shifted] += 1
            return super().call_function(target, args, kwargs)

    norms = Norms(fuse(UNet(replace(config, num_classes=0, text_encoder="none"))))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, config.image_channels, config.image_size, config.image_size)
        norms.run(x.to(memory_format=torch.channels_last), torch.empty(1), None)
    return seen


def norm_bytes(variant: Variant, config: UNetConfig, batch: int) -> tuple[float, float]:
    """Bytes an element of all the network's norms, each compiled alone: forward, backward."""
    totals, elements = [0.0, 0.0], 0
    for (channels, side, silu, shifted), times in norm_shapes(config).items():
        x = torch.empty(batch, side, side, channels, dtype=torch.bfloat16, device="meta").permute(0, 3, 1, 2)
        if variant == "stock-nchw":
            x = torch.empty(x.shape, dtype=torch.bfloat16, device="meta")
        norm = nn.GroupNorm(config.norm_groups, channels, config.norm_eps)

        def apply(
            x: Tensor, weight: Tensor, bias: Tensor, *shift: Tensor, norm: nn.GroupNorm = norm, silu: bool = silu
        ) -> Tensor:
            if variant == "ours":
                return group_norm_silu(
                    x, weight, bias, norm.num_groups, norm.eps, shift=shift[0] if shift else None,
                    activation="silu" if silu else "none",
                )  # fmt: skip
            with torch.autocast(x.device.type, torch.bfloat16):
                u = x + shift[0][:, :, None, None] if shift else x
                y = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (u,))
                return (F.silu(y) if silu else y).to(x.dtype)

        inputs = [x.requires_grad_(), norm.weight, norm.bias]
        if shifted:
            inputs.append(torch.empty(batch, channels, dtype=torch.bfloat16, device="meta").requires_grad_())
        with norms_of(variant):
            graphs = inductor_mock.count(apply, inputs)
        for i, graph in enumerate(graphs):
            totals[i] += times * graph.bytes
        elements += times * x.numel()
    return totals[0] / elements, totals[1] / elements


def launches(op: Any, args: tuple[Any, ...]) -> int:
    """CUDA kernels that an operator of the update starts: 0 for a view or a profiler's mark, 1 for a plain one.

    A foreach operator packs chunks of 65,536 elements of many tensors into one launch: at most 320 chunks, and 110, 64,
    48, 36 or 30 tensors for 1 to 5 lists (multi_tensor_apply.cuh); a norm needs a second kernel.
    """
    if op.is_view or "detach" in str(op) or op.namespace == "profiler":
        return 0
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    if "_foreach" not in str(op) and "_fused" not in str(op):
        return 1
    most = (110, 64, 48, 36, 30)[len(lists) - 1]
    count = tensors = chunks = 0
    for tensor in lists[0]:
        left = -(-tensor.numel() // 65536)
        tensors += 1
        while left:
            taken = min(left, 320 - chunks)
            chunks, left = chunks + taken, left - taken
            if chunks == 320 or (tensors == most and not left):
                count += 1
                chunks, tensors = 0, 1 if left else 0
    count += chunks > 0
    return count + ("norm" in str(op))


def moved(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that an operator of the update moves: each tensor that it reads, writes or returns, once for each."""

    def size(value: Any) -> int:
        return sum(v.nbytes for v in pytree.tree_leaves(value) if isinstance(v, Tensor))

    names = [argument.name for argument in op._schema.arguments]
    given, total = dict(zip(names, args, strict=False)) | kwargs, 0
    for argument in op._schema.arguments:
        # Copies only write; AdamW's "grads" are written only where it is to scale them.
        only = argument.name in ("half", "grads") or "copy_" in str(op) or "fill_" in str(op)
        total += size(given.get(argument.name)) * (2 if argument.is_write and not only else 1)
    return total + (0 if op._schema.is_mutable else size(result))


def optimizer_counts(variant: Variant, config: UNetConfig) -> tuple[int, int, int]:
    """Operators, kernels and bytes of one update of the weights; the same operators run on a GPU."""
    step = make_step(variant, config)
    seen: list[tuple[int, int]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if started := launches(func, args):
                seen.append((started, moved(func, args, kwargs or {}, result)))
            return result

    gradients = [torch.zeros_like(w) for w in step.update.weights.values()]

    def update() -> None:
        step.update.begin(lr=2e-4)
        step.update.add(gradients)
        step.update.apply(grad_clip=1.0)

    update()  # makes the moments
    with Recorder():
        update()
    return len(seen), sum(kernels for kernels, _ in seen), sum(size for _, size in seen)


def contributors(graphs: list[inductor_mock.Graph], batch: int, limit: int = 25) -> list[list[Any]]:
    """The calls that ask for most bytes, those of one kind and shape together."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for graph in graphs:
        for call in graph.calls:
            entry = sums[graph.name, call.kind, _what(call)]
            entry[0] += 1
            entry[1] += call.bytes / batch / 1e6
    rows = sorted(sums.items(), key=lambda item: -item[1][1])[:limit]
    return [[*key, int(calls), round(megabytes, 3)] for key, (calls, megabytes) in rows]


def _what(call: Call) -> str:
    operators = ", ".join(o.removeprefix("aten.").removeprefix("prims.").rsplit(".", 1)[0] for o in call.origins)
    name = call.name if call.kind != "triton" else ""
    return " ".join(filter(None, (name, call.shape, f"({operators})" if call.kind != "user" else "")))


def count_variant(variant: Variant, config: UNetConfig, batch: int) -> Counts:
    """Everything about one variant."""
    graphs = graphs_of(variant, config, batch)
    forward, backward = (g.bytes / batch / 1e6 for g in graphs)
    triton = sum(g.triton for g in graphs)
    kinds = Counter(f"{g.name} {call.kind}" for g in graphs for call in g.calls)
    operators, kernels, moved_bytes = optimizer_counts(variant, config)
    norm_forward, norm_backward = norm_bytes(variant, config, batch)
    return Counts(
        round(forward, 3), round(backward, 3), triton, triton + sum(g.extern for g in graphs),
        (round(norm_forward, 3), round(norm_backward, 3)),
        operators, kernels, round(moved_bytes / batch / 1e6, 3), dict(kinds), contributors(graphs, batch),
    )  # fmt: skip


def count_small(variant: Variant) -> dict[str, int]:
    """Bytes, launches and calls of the small network at batch 128, which a test counts again and compares."""
    graphs = graphs_of(variant, SMALL, 128)
    return {
        "bytes": sum(g.bytes for g in graphs),
        "triton": sum(g.triton for g in graphs),
        "calls": sum(g.triton + g.extern for g in graphs),
    }

"""Inductor's code for an H100, generated and counted on a machine without a GPU.

Fake tensors on a "cuda" device go through AOTAutograd and Inductor exactly as torch.compile would send them, up to the
point where Triton would compile the kernels. What Inductor then knows is read off: which kernels it launches and how
many bytes each asks for. Nothing is computed, so a count needs no clock and is the same on every machine.

Inductor asks the device for its properties in many places; `h100()` answers for it, by patching torch's internals. It
is known to work with the versions in TORCH alone and refuses others.
"""

import contextlib
import math
import re
import sys
import types
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch._decomp
import torch.nn.functional as F
import torch.utils._pytree as pytree
import triton.runtime.driver
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget

import kernels  # noqa: F401  its modules are patched
from fastdiff.errors import UserError

with contextlib.suppress(ImportError):  # internals; another torch imports this file, and `check_version` says why not
    import torch._inductor.config as inductor_config
    from functorch.compile import aot_function
    from torch._dynamo.device_interface import CudaInterface
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor import compile_fx, decomposition, ir, scheduler
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import fuse_attention, joint_graph, misc_patterns, pad_mm
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

TORCH = ("2.15",)

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536, warp_size=32, total_memory=80 * 2**30, shared_memory_per_block_optin=232448,
    shared_memory_per_block=49152, shared_memory_per_multiprocessor=233472, L2_cache_size=50 * 2**20,
    gcnArchName="", max_threads_per_block=1024,
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One kernel or library call of a graph.

    kind     "triton" (Inductor's own), "user" (a kernel of ours) or "extern" (convolution, matrix product, attention)
    name     of the kernel
    read, written   bytes, each buffer once
    shape    and dtype of the largest buffer written, for a reader
    origins  the operators that it does, for a reader
    """

    kind: str
    name: str
    read: int
    written: int
    shape: str
    origins: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class Graph:
    """A compiled forward or backward pass.

    triton, extern   calls in the generated wrapper's own text
    code             that text, a Python module
    constants        tensors that it expects under these names
    """

    name: str
    calls: tuple[Call, ...]
    triton: int
    extern: int
    code: str
    constants: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        """Of all its calls."""
        return sum(call.bytes for call in self.calls)


def check_version() -> None:
    """Raises UserError for a torch whose internals are not known to fit."""
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in TORCH:
        raise UserError(
            f"torch {torch.__version__} has internals that bench/inductor_mock.py does not know; "
            f"count with torch {' or '.join(TORCH)}."
        )


class _Driver:
    """What Triton asks of a GPU's driver while Inductor generates code."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def h100() -> Generator[None]:
    """Answer for an H100 wherever Inductor asks, and stop before kernels are compiled. Raises UserError; see TORCH."""
    check_version()

    def channels_last_if_either(x: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
        last = torch.channels_last
        either = x.is_contiguous(memory_format=last) or weight.is_contiguous(memory_format=last)
        return last if x.ndim == 4 and either else torch.contiguous_format

    def answer(value: object) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    cuda = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": PROPERTIES,
        "get_device_capability": (9, 0), "synchronize": None, "_lazy_init": None, "is_initialized": False,
        "is_bf16_supported": True, "_exchange_device": 0, "_maybe_exchange_device": 0,
        "current_stream": types.SimpleNamespace(cuda_stream=0),
        "get_rng_state": torch.get_rng_state(), "set_rng_state": None,
    }  # fmt: skip
    interface = {
        "is_available": True, "current_device": 0, "get_compute_capability": 90, "get_device_properties": PROPERTIES,
        "is_bf16_supported": True, "is_triton_capable": True, "raise_if_triton_unavailable": None,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:

        def patch(target: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        for name, value in cuda.items():
            patch(torch.cuda, name, answer(value))
        for name, value in interface.items():
            patch(CudaInterface, name, staticmethod(answer(value)))
        patch(CudaInterface.Worker, "get_device_properties", staticmethod(answer(PROPERTIES)))
        patch(CudaInterface.Worker, "current_device", staticmethod(answer(0)))
        patch(triton.runtime.driver, "_active", _Driver())
        for name in ("group_norm_launch", "merge_columns"):  # tracing is on fake CPU tensors
            patch(sys.modules[f"kernels.{name}"], "runs_triton", answer(True))
        # PyTorch indexes the seeds, which would start the driver.
        patch(torch.ops.prims.inductor_lookup_seed.default, "prim_meta_impl", lambda seeds, _: seeds.new_empty(()))
        # An embedding's gradient, whose decomposition would start the driver too; Inductor has a lowering for it.
        adds = torch.ops.aten._unsafe_masked_index_put_accumulate.default
        stack.enter_context(mock.patch.dict(torch._decomp.decomposition_table, {adds: lambda x, *_: x.clone()}))
        patch(scheduler, "has_triton", answer(True))  # cached, perhaps from before
        patch(decomposition, "is_gpu", answer(True))  # there, a bias's gradient is a sum apart from the convolution's
        patch(torch._C, "_conv_determine_backend_memory_format", channels_last_if_either)
        # These trace their patterns on real CUDA tensors; none matches this network, which calls SDPA by its name.
        for module, name in ((fuse_attention, "_sfdp_init"), (misc_patterns, "_misc_patterns_init"),
                             (pad_mm, "_pad_mm_init"), (joint_graph, "lazy_init")):  # fmt: skip
            patch(module, name, answer(None))
        stack.enter_context(inductor_config.patch(compile_threads=1, force_disable_caches=True, fx_graph_cache=False))
        yield


class _AsOnCuda(TorchFunctionMode):
    """Make operators on fake CPU tensors dispatch as they would on CUDA, where the two differ in this project's code.

    CUDA autocast runs group_norm in float32; attention takes the flash kernel, or with a mask the efficient one;
    dropout is one fused operator.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.group_norm and torch.is_autocast_enabled("cpu"):
            args, kwargs = pytree.tree_map_only(Tensor, lambda v: v.float(), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            q, k, v = (v.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else v for v in args[:3])
            if args[3:]:  # a mask, which flash attention does not take
                bias = torch.zeros_like(args[3], dtype=q.dtype).masked_fill(~args[3], -math.inf)
                bias = bias.expand(*q.shape[:3], k.shape[2])
                return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, **kwargs)[0]
        if func is F.dropout:
            p = kwargs["p"]
            return torch.native_dropout(args[0], p, True)[0] if p > 0 else args[0]
        return func(*args, **kwargs)


def _to_cuda(gm: torch.fx.GraphModule, example: Sequence[Any]) -> list[Any]:
    """Turn a graph over fake CPU tensors into one over fake CUDA tensors, in place; returns inputs for it."""

    def moved(v: Any) -> Any:
        return torch.device("cuda", 0) if isinstance(v, torch.device) and v.type == "cpu" else v

    for node in gm.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(moved, (node.args, dict(node.kwargs)))
    gm.recompile()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        inputs = [_cuda_like(v) if isinstance(v, Tensor) else v for v in example]
        for node in gm.graph.find_nodes(op="get_attr"):  # constants, such as the schedule's table
            v = getattr(gm, node.target)
            if isinstance(v, Tensor):
                gm._buffers.pop(node.target, None)
                setattr(gm, node.target, _cuda_like(v))
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs)
    return inputs


def _cuda_like(v: Tensor) -> Tensor:
    """With v's strides and offset too: Inductor derives from them how far an address is aligned."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(v.shape, v.stride(), strict=True))
    storage = torch.empty(v.storage_offset() + elements, dtype=v.dtype, device="cuda")
    return storage.as_strided(v.shape, v.stride(), v.storage_offset())


def count(fn: Callable[..., Tensor], inputs: Sequence[Tensor], options: dict[str, Any] | None = None) -> list[Graph]:
    """The graphs that Inductor makes of `fn(*inputs)` and its backward pass: [forward, backward].

    Args:
        fn: returns one tensor. Its gradient is taken of every input that requires one.
        inputs: CPU tensors (or on "meta") whose shapes, strides and dtypes count; their values are never read.
        options: as of torch.compile.
    """
    check_version()
    captured: list[tuple[str, torch.fx.GraphModule, list[Any]]] = []

    def partition(joint: torch.fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        options.pop("compiler", None)
        with V.set_fake_mode(mode):
            joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, joint_inputs, compiler="inductor", **options)

    def compiler(name: str) -> Callable[..., Any]:
        def compile(gm: torch.fx.GraphModule, example: list[Any]) -> Any:
            results: Any = gm.graph.output_node().args[0]
            outputs = [r.meta["val"] if isinstance(r, torch.fx.Node) else r for r in results]
            captured.append((name, gm, example))

            def run(args: list[Any]) -> list[Any]:  # shapes for the backward pass
                args.clear()
                return list(outputs)

            run._boxed_call = True  # ty: ignore[missing-attribute]
            return run

        return compile

    def on_cuda(*args: Tensor) -> Tensor:
        with _AsOnCuda():
            return fn(*args)

    with h100():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [
                torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cpu").requires_grad_(v.requires_grad)
                for v in inputs
            ]
            traced = aot_function(
                on_cuda, fw_compiler=compiler("forward"), bw_compiler=compiler("backward"), partition_fn=partition,
                decompositions=select_decomp_table(),
            )  # fmt: skip
            out = traced(*fakes)
            out.backward(torch.empty_like(out))
        with inductor_config.patch(options or {}):
            return [_lower(name, gm, example) for name, gm, example in captured]


def _lower(name: str, gm: torch.fx.GraphModule, example: Sequence[Any]) -> Graph:
    """Have Inductor generate a graph's code."""
    graphs: list[Graph] = []

    class Stop(Exception):
        """The code is there; nothing is to be compiled."""

    def read(lowering: GraphLowering) -> None:
        graphs.append(_read(name, lowering, constants))
        raise Stop

    constants = {str(node.target): getattr(gm, str(node.target)) for node in gm.graph.find_nodes(op="get_attr")}
    inputs = _to_cuda(gm, example)
    with mock.patch.object(GraphLowering, "compile_to_module", read), torch.no_grad():
        try:
            with V.set_fake_mode(detect_fake_mode(inputs)), tracing(TracingContext(detect_fake_mode(inputs))):
                compile_fx.compile_fx_inner(gm, inputs)
        except Exception:
            if not graphs:  # not our Stop, which torch may wrap
                raise
    return graphs[0]


def _read(name: str, lowering: Any, constants: dict[str, Tensor]) -> Graph:
    """Generate the code and read off its calls."""
    code = lowering.codegen()[0]
    code = getattr(code, "value", code)
    body = code[code.index("def call(") :]
    triton = len(re.findall(r"\.run\(", body))
    extern = len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.[\w.]+\(", body))
    calls = tuple(call for node in lowering.scheduler.nodes if (call := _call(node)) is not None)
    return Graph(name, calls, triton, extern, code, constants)


def _call(node: Any) -> Call | None:
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return None
    read, written = node.get_read_buffer_sizes(), node.get_write_buffer_sizes()
    kind, label = "triton", node.get_name()
    if isinstance(node, ExternKernelSchedulerNode):
        kind, label = "extern", str(getattr(node.node, "python_kernel_name", None) or type(node.node).__name__)
        if isinstance(node.node, ir.UserDefinedTritonKernel):
            kind = "user"
            read, written, label = _user_kernel(node.node)
        elif ".convolution_backward." in label and all(node.node.constant_args[-3:-1]):
            read += _bytes(node.node.inputs[0])  # dy: input and weight have a kernel each for their gradients
        elif ".forked_conv_backward." in label:
            read += _bytes(node.node.inputs[0]) * (1 + node.node.constant_args[-1])  # and the bias, if there is one
    origins = sorted({str(origin.target) for origin in getattr(node, "get_origins", lambda: ())() or _origins(node)})
    return Call(kind, label, read, written, _shape(node), tuple(origins))


def _origins(node: Any) -> set[Any]:
    return {o for n in node.get_nodes() if n.node is not None for o in n.node.get_origins()}


def _shape(node: Any) -> str:
    """Shape and dtype of the largest buffer that the node writes."""
    best, text = -1, ""
    for n in node.get_nodes():
        for out in n.get_outputs():
            layout = out.node.maybe_get_layout() if hasattr(out.node, "maybe_get_layout") else None
            if layout is not None and hasattr(layout, "size"):
                size = [int(s) for s in layout.size]
                numel = 1
                for s in size:
                    numel *= s
                if numel > best:
                    best, text = numel, f"{str(layout.dtype).removeprefix('torch.')} {size}"
    return text


def _bytes(buffer: Any) -> int:
    return int(buffer.get_numel() * buffer.get_dtype().itemsize)


def _user_kernel(node: Any) -> tuple[int, int, str]:
    """Bytes read and written by one of our kernels, and its name.

    Inductor books every buffer that a user's kernel writes as read too. Ours never read what was in it (the wrapper
    allocates it just before), so each counts once.
    """
    written = {buffer.get_name() for buffer in node.mutable_args}
    sizes = {arg.get_name(): _bytes(arg) for arg in node.inputs}
    kernel, *_ = node.get_kernel_and_metadata()
    name = kernel.fn.__name__
    reads = sum(size for buffer, size in sizes.items() if buffer not in written)
    return reads, sum(size for buffer, size in sizes.items() if buffer in written), name

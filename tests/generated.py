"""Run what Inductor generates for a GPU on a CPU: its wrapper as it is, the Triton kernels in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/generated.py CODE RESULT

CODE is a torch.save of {"graphs": [(code, {name: constant}) of the forward pass, the same of the backward pass],
"inputs": [tensor]}, as `bench.inductor_mock` generates them; RESULT becomes one of [results of the forward pass,
gradients of the first of them].
"""

import contextlib
import importlib.util
import inspect
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch._inductor import async_compile
from torch._inductor.runtime import triton_helpers, triton_heuristics
from triton.runtime import interpreter

import kernels  # noqa: F401  the wrapper calls their operators
from kernels.launch import power_of_2
from tests.interpreter import as_on_a_gpu

REDUCTION = {"XBLOCK": 32, "R0_BLOCK": 64}  # blocks of Inductor's; it masks what lies outside


class Kernel:
    """A kernel as the wrapper launches it: `run(*arguments, stream=...)`."""

    def __init__(self, kind: str, function: Any, triton_meta: dict[str, Any], inductor_meta: dict[str, Any]) -> None:
        self.kind, self.function, self.triton_meta, self.inductor_meta = kind, function, triton_meta, inductor_meta
        annotations = inspect.get_annotations(function.fn)
        # The launcher is given all but what our own kernels declare as constants.
        self.passed = [n for n in function.arg_names if "constexpr" not in str(annotations.get(n))]

    def run(self, *arguments: Any, stream: int) -> None:
        """Launch by Inductor's own expression of the grid."""
        extra = self.inductor_meta.get("extra_launcher_args", [])
        given = dict(zip([*self.passed, *extra], arguments, strict=True))
        sizes = REDUCTION
        if self.kind == "pointwise":
            sizes = {f"{axis}BLOCK": self.block(axis.lower(), given) for axis in "XY"}
        config = {block: size for block, size in sizes.items() if block in self.function.arg_names}
        grid = triton_heuristics.GridExpr.from_meta(self.inductor_meta, config).eval_slow({**given, **config})
        own = {name: given[name] for name in self.passed}
        self.function[grid](**{**own, **config, **self.triton_meta["constants"]})

    def block(self, axis: str, given: dict[str, Any]) -> int:
        """Large enough for a few programs along an axis; where kernels were merged, each has a size of its own."""
        sizes = given | self.inductor_meta.get("combo_grid_meta", {})
        return min(
            1024, power_of_2(max((n for name, n in sizes.items() if name.startswith(f"{axis}numel")), default=1))
        )


def decorator(kind: str) -> Callable[..., Any]:
    """In place of triton_heuristics' decorator of this name."""

    def decorate(*, triton_meta: dict[str, Any], inductor_meta: dict[str, Any], **_: Any) -> Any:
        return lambda function: Kernel(kind, function, triton_meta, inductor_meta)

    return decorate


class Mathematics:
    """CUDA's libdevice by NumPy's functions of the same names."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def function(x: tl.tensor) -> tl.tensor:
            values = x.handle.data
            result = 1 / np.sqrt(values) if name == "rsqrt" else getattr(np, name)(values)
            return tl.core.tensor(interpreter.TensorHandle(result.astype(values.dtype), x.handle.dtype), x.type)

        return function


class Language:
    """triton.language.math, looked up when called: the interpreter changes it for each kernel."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(tl.math, name)


def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
              return_debug_mask: bool = False, *, scale: float | None = None) -> tuple[Any, ...]:  # fmt: skip
    """aten._scaled_dot_product_flash_attention, which has no CPU kernel; q, k, v (N, heads, L, C)."""
    scores = q.float() @ k.float().mT * (scale or q.shape[-1] ** -0.5)
    log_sum = scores.logsumexp(-1)
    out = _like_query((scores - log_sum[..., None]).exp() @ v.float(), q)
    seed, offset = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return out, log_sum, None, None, q.shape[2], k.shape[2], seed, offset, q.new_empty(0)


def attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, *_: Any,
                       scale: float | None = None) -> tuple[Tensor, ...]:  # fmt: skip
    """Its backward."""
    scale = scale or q.shape[-1] ** -0.5
    p = (q.float() @ k.float().mT * scale - log_sum[..., None]).exp()
    dout = dout.float()
    ds = p * (dout @ v.float().mT - (dout * out.float()).sum(-1, keepdim=True)) * scale
    return tuple(_like_query(g, q) for g in (ds @ k.float(), ds.mT @ q.float(), p.mT @ dout))


def _like_query(v: Tensor, q: Tensor) -> Tensor:
    """In the memory order that the CUDA kernel gives: (N, L, heads, C)."""
    return v.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A buffer full of NaN, so that nothing goes unnoticed that a kernel leaves unwritten."""
    return torch.empty_strided(size, stride, dtype=dtype).fill_(math.nan if dtype.is_floating_point else 77)


def load(source: str, folder: Path) -> Any:
    """Import a source text as a module."""
    path = folder / f"part_{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def on_a_cpu(folder: Path):
    """Answer for the GPU that the wrapper and its kernels expect."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", attention, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", attention_backward, "CPU")

    def triton(self: Any, name: str, source: str, device_str: str) -> Kernel:
        return getattr(load(source, folder), name)

    with contextlib.ExitStack() as stack:
        for kind in ("pointwise", "reduction", "persistent_reduction", "foreach", "user_autotune"):
            stack.enter_context(mock.patch.object(triton_heuristics, kind, decorator(kind)))
        for target, name, value in (
            (triton_helpers, "libdevice", Mathematics()), (triton_helpers, "math", Language()),
            (triton_helpers, "set_driver_to_gpu", lambda: None), (async_compile.AsyncCompile, "triton", triton),
            (torch._C._dynamo.guards, "_empty_strided_cuda", empty), (torch.cuda, "set_device", lambda device: None),
            (torch.cuda, "_DeviceGuard", lambda device: contextlib.nullcontext()),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=0, create=True))
        yield


def run(graphs: list[tuple[str, dict[str, Tensor]]], inputs: list[Tensor]) -> list[list[Tensor]]:
    """-> results of the forward pass, and the gradients of the first of them."""
    with tempfile.TemporaryDirectory() as name, on_a_cpu(Path(name)), torch.no_grad():
        calls = []
        for code, constants in graphs:
            code = code.replace("device='cuda:0'", "device='cpu'").replace("type='cuda', index=0)", "type='cpu')")
            module = load(code, Path(name))
            for constant, value in constants.items():
                setattr(module, constant, value)
            calls.append(module.call)
        results = list(calls[0](list(inputs)))
        gradients = list(calls[1]([*results[1:], torch.ones_like(results[0])]))
    return [results, gradients]


if __name__ == "__main__":
    as_on_a_gpu()
    torch.save(run(**torch.load(sys.argv[1])), sys.argv[2])

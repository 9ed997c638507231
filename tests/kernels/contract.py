"""Runs one case of a SPEC through the fused op, the plain composition and the composition in float64."""

from collections.abc import Callable
from typing import Any

import torch

from kernels.spec import Inputs, KernelSpec
from tests.numerics import assert_as_accurate


def copy(inputs: Inputs, device: torch.device, wide: bool = False) -> Inputs:
    """Fresh tensors on `device`, floating ones in float64 if `wide`; strides are kept."""

    def one(v: Any) -> Any:
        if not isinstance(v, torch.Tensor):
            return v
        dtype = torch.float64 if wide and v.is_floating_point() else v.dtype
        return v.detach().to(device=device, dtype=dtype, copy=True)

    return {name: one(v) for name, v in inputs.items()}


def outcome(
    spec: KernelSpec, fn: Callable[..., Any], inputs: Inputs, weight: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Call `fn`, and backward from the sum of its result times `weight` -> results, what it wrote, every gradient."""
    names = [name for name in spec.differentiable if inputs.get(name) is not None]
    for name in names:
        inputs[name].requires_grad_()
    y = fn(**inputs)
    if spec.mutates:
        return {name: inputs[name] for name in spec.mutates if inputs[name] is not None}
    assert weight is not None
    y.backward(weight.to(device=y.device, dtype=y.dtype))
    return {"y": y.detach()} | {f"d{name}": inputs[name].grad for name in names}


def check(spec: KernelSpec, inputs: Inputs, device: torch.device, *, fn: Callable[..., Any] | None = None) -> None:
    """Assert the tolerance rule on everything that the op returns, writes or differentiates."""
    weight = None
    if not spec.mutates:
        shape = next(iter(inputs.values())).shape
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(shape, generator=generator).bfloat16()  # exact in every dtype compared
        if len(shape) == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
    fused = outcome(spec, fn or spec.op, copy(inputs, device), weight)
    eager = outcome(spec, spec.reference, copy(inputs, device), weight)
    exact = outcome(spec, spec.reference, copy(inputs, device, wide=True), weight)
    assert fused.keys() == exact.keys()
    for name, value in fused.items():
        assert value.dtype == eager[name].dtype
        assert value.device.type == device.type
        assert_as_accurate(value, eager[name], exact[name].double(), f"{spec.name}: {name}")

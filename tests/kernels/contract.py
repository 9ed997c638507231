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
    """Call `fn`, and backward from the sum of its results times weights -> results, what it wrote, every gradient.

    The weights are drawn, exact in every dtype that is compared; `weight` is another one for an op with one result.
    """
    names = [name for name in spec.differentiable if inputs.get(name) is not None]
    for name in names:
        inputs[name].requires_grad_()
    results = fn(**inputs)
    if spec.mutates:
        return {name: inputs[name] for name in spec.mutates if inputs[name] is not None}
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    weights = [_weight(y.shape, generator).to(y.device, y.dtype) for y in results]
    if weight is not None:
        weights = [weight.to(results[0].device, results[0].dtype)]
    values = {f"result {i}": y.detach() for i, y in enumerate(results)}
    if not names:
        return values
    torch.autograd.backward(results, weights)
    return values | {f"d{name}": inputs[name].grad for name in names}


def _weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    weight = torch.randn(shape, generator=generator).bfloat16()
    return weight.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else weight


def check(spec: KernelSpec, inputs: Inputs, device: torch.device, *, fn: Callable[..., Any] | None = None) -> None:
    """Assert the tolerance rule on everything that the op returns, writes or differentiates."""
    fused = outcome(spec, fn or spec.op, copy(inputs, device))
    eager = outcome(spec, spec.reference, copy(inputs, device))
    exact = outcome(spec, spec.reference, copy(inputs, device, wide=True))
    assert fused.keys() == exact.keys()
    for name, value in fused.items():
        assert value.dtype == eager[name].dtype
        assert value.device.type == device.type
        assert_as_accurate(value, eager[name], exact[name].double(), f"{spec.name}: {name}")

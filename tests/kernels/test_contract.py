"""What every kernel with a SPEC must do."""

import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import REGISTRY
from tests.kernels.contract import check, copy, outcome

CASES = [
    pytest.param(spec, case, dtype, id=f"{spec.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for spec in REGISTRY.values()
    for case in spec.cases
    for dtype in spec.dtypes
]
NORMS = ("group_norm_silu", "add_group_norm_silu")
SPECS = [pytest.param(spec, id=name) for name, spec in REGISTRY.items()]


def drawn(case, dtype):
    return case.make(dtype, torch.Generator().manual_seed(0))


def test_every_kernel_is_registered(repo):
    files = [path.stem for path in (repo / "kernels").glob("*.py") if "\nSPEC = " in path.read_text()]
    assert sorted(spec.op.__module__ for spec in REGISTRY.values()) == sorted(f"kernels.{name}" for name in files)
    assert len(files) >= 6
    assert kernels.__file__ == str(repo / "kernels" / "__init__.py")


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_has_cases_enough_and_a_public_name(spec):
    assert len(spec.cases) > 1, "the tests of two runs and of opcheck take the second"
    assert spec.op.__name__ in kernels.__all__, "export it in kernels/__init__.py"


@pytest.mark.parametrize(("spec", "case", "dtype"), CASES)
def test_values_and_gradients(spec, case, dtype, device):
    check(spec, drawn(case, dtype), device)


@pytest.fixture
def ahead(monkeypatch) -> list[bool]:
    """Programs load ahead; where an image is no loop, two of them have all tiles. -> whether each launch did so."""
    launch, launches = sys.modules["kernels.group_norm_launch"], []
    meta = launch._meta

    def norm_tiles(*args, **kwargs):
        return replace(kernels.launch.norm_tiles(*args, **kwargs), ahead=2)

    def limits(device):
        return 1, 2**30 if kernels.launch.INTERPRETED else kernels.launch.gpu_limits(device)[1]

    def noted(*args, **kwargs):
        chosen = meta(*args, **kwargs)
        launches.append(chosen[2]["AHEAD"])
        return chosen

    monkeypatch.setattr(launch, "norm_tiles", norm_tiles)
    monkeypatch.setattr(launch, "gpu_limits", limits)
    monkeypatch.setattr(launch, "_meta", noted)
    return launches


@pytest.mark.parametrize(("spec", "case", "dtype"), [case for case in CASES if case.values[0].name in NORMS])
def test_values_and_gradients_of_programs_that_load_ahead(spec, case, dtype, device, ahead):
    if device.type == "cpu" and not kernels.launch.INTERPRETED:
        pytest.skip("PyTorch's own operators have no programs")
    check(spec, drawn(case, dtype), device)
    assert all(ahead) or device.type == "cuda", "a GPU's shared memory may not suffice"
    assert ahead or case.name == "no images"


@pytest.mark.parametrize("spec", SPECS)
def test_two_runs_agree_bit_for_bit(spec, device):
    inputs = drawn(spec.cases[1], spec.dtypes[0])
    first, second = (outcome(spec, spec.op, copy(inputs, device)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_counted(spec):
    forward, backward = spec.min_bytes(drawn(spec.cases[0], spec.dtypes[0]))
    assert forward > 0
    assert (backward > forward) == bool(spec.differentiable)


class Recorder(TorchDispatchMode):
    """Notes every call of this package's custom ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastdiff_kernels":
            self.calls.append(
                (func, torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, args))
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", SPECS)
def test_opcheck(spec, device):
    """Schema, fake rule, autograd registration and AOT dispatch of the op and, if it has one, of its backward."""
    case = next((c for c in spec.cases if c.name == "everything at once"), spec.cases[1])
    inputs = drawn(case, torch.float32)
    with Recorder() as recorder:
        outcome(spec, spec.op, copy(inputs, device))
    ours = bool(list(spec.jobs()))  # else it is made of PyTorch's operators
    assert len(recorder.calls) == ours * (2 if spec.differentiable else 1)
    for i, (op, args) in enumerate(recorder.calls):
        if i == 0 and spec.differentiable:
            args = [v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in args]
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if not kernels.launch.INTERPRETED:  # tracing cannot look into an interpreted kernel
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(op, tuple(args), test_utils=tests)


@pytest.mark.parametrize("spec", SPECS)
def test_compiles_without_a_graph_break_or_recompile(spec, device, compiled):
    """fullgraph raises at a break; the second run, with other values, must reuse the first one's code."""
    case = next((c for c in spec.cases if c.name == "everything at once"), spec.cases[1])
    fn = torch.compile(lambda **inputs: spec.op(**inputs), fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(spec, case.make(torch.float32, torch.Generator().manual_seed(0)), device, fn=fn)
        with torch.compiler.set_stance("fail_on_recompile"):
            check(spec, case.make(torch.float32, torch.Generator().manual_seed(1)), device, fn=fn)

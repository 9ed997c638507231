"""What a kernel promises, in a form that the contract tests, the benchmarks and the profiles can run or read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Inputs = dict[str, Any]  # argument name -> tensor or plain value, in the order of the op's signature


@dataclass(frozen=True)
class Case:
    """One set of arguments. `make(dtype, generator)` draws them on the CPU, deterministically given the generator."""

    name: str
    make: Callable[[torch.dtype, torch.Generator], Inputs]


@dataclass(frozen=True)
class Job:
    """One Triton kernel at one shape, as Triton's ahead-of-time compiler wants it; see bench/aot.py.

    label      of the shape and what is switched on
    kernel     where the function is: "package.module:name"
    types      argument -> "*bf16", "i32", ...; absent ones are constants
    constants  compile-time arguments
    wide       pointers whose every access must move 16 bytes a thread
    divisible  numbers that are multiples of 16 in the network, as the launcher tells the compiler
    """

    label: str
    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    wide: frozenset[str] = frozenset()
    divisible: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return self.kernel.partition(":")[2]


@dataclass(frozen=True)
class KernelSpec:
    """A public op, the plain PyTorch composition that it replaces, and where the two are compared.

    name            unique, also the key in REGISTRY
    op              the public function; it returns a tensor or several, or writes into the arguments named by `mutates`
    reference       the same arguments and effect in plain PyTorch, in the dtype of its inputs (float64 gives the truth)
    cases           arguments to compare on; the same names for `op` and `reference`
    dtypes          dtypes of the main input
    min_bytes       inputs -> (forward, backward) bytes that any implementation must move; backward 0 if there is none
    category        of its time in a profile
    differentiable  argument names whose gradients are compared (those that a case leaves as None are skipped)
    mutates         argument names that the op writes in place, in the order in which they are compared
    jobs            the Triton kernels at the shapes of the CIFAR-10 U-Net, to be compiled ahead of time
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    cases: tuple[Case, ...]
    dtypes: tuple[torch.dtype, ...]
    min_bytes: Callable[[Inputs], tuple[int, int]]
    category: Literal["norm", "optimizer", "attention", "conv"]
    differentiable: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    jobs: Callable[[], Iterable[Job]] = field(default=tuple)

    @property
    def operator(self) -> str:
        """The op's own name, with which the names of its operators in `torch.ops.fastdiff_kernels` begin."""
        return getattr(self.op, "__name__")  # noqa: B009

"""What a kernel promises, in a form that the contract tests and the benchmarks can run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Inputs = dict[str, Any]  # argument name -> tensor or plain value, in the order of the op's signature


@dataclass(frozen=True)
class Case:
    """One set of arguments. `make(dtype, generator)` draws them on the CPU, deterministically given the generator."""

    name: str
    make: Callable[[torch.dtype, torch.Generator], Inputs]


@dataclass(frozen=True)
class KernelSpec:
    """A public op, the plain PyTorch composition that it replaces, and where the two are compared.

    name            unique, also the key in REGISTRY
    op              the public function; it returns a tensor or several, or writes into the arguments named by `mutates`
    reference       the same arguments and effect in plain PyTorch, in the dtype of its inputs (float64 gives the truth)
    cases           arguments to compare on; the same names for `op` and `reference`
    dtypes          dtypes of the main input
    differentiable  argument names whose gradients are compared (those that a case leaves as None are skipped)
    mutates         argument names that the op writes in place, in the order in which they are compared
    min_bytes       inputs -> (forward, backward) bytes that any implementation must move; backward 0 if there is none
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    cases: tuple[Case, ...]
    dtypes: tuple[torch.dtype, ...]
    min_bytes: Callable[[Inputs], tuple[int, int]]
    differentiable: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()

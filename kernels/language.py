"""`triton`, its language `tl` and PyTorch's `triton_op`, or stand-ins where Triton is missing, as on a Mac.

With these the package imports, and CPU tensors run the references; `launch.traceable` refuses to launch a kernel.
"""

from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.library import custom_op, infer_schema

__all__ = ["INTERPRETED", "TRITON_INSTALLED", "tl", "triton", "triton_op"]

try:
    import triton
    import triton.language as tl
    from triton import knobs

    TRITON_INSTALLED = True
    # With TRITON_INTERPRET=1 in the environment before the first import of triton, `jit` builds interpreted kernels.
    INTERPRETED = bool(knobs.runtime.interpret)

    def triton_op(name: str, *, mutates_args: Iterable[str]) -> Callable[..., Any]:
        """As PyTorch's, which would search the function's source for kernels, and import its compiler for that.

        The search, for the keys of caches, takes seconds and finds none of ours; `caching` covers them all.
        """

        def register(function: Any) -> Any:
            schema = infer_schema(function, mutates_args=mutates_args)
            without_source: Any = partial(function)
            without_source.__globals__ = function.__globals__  # torch 2.11 infers the schema anew
            return torch.library.triton_op(name, without_source, mutates_args=mutates_args, schema=schema)

        return register

except ModuleNotFoundError as error:
    if error.name != "triton":  # Triton is there, but cannot be imported
        raise

    def _jit(function: Any = None, **options: Any) -> Any:
        return function or _jit

    TRITON_INSTALLED = INTERPRETED = False
    triton: Any = SimpleNamespace(jit=_jit)
    tl: Any = SimpleNamespace(constexpr=lambda value: SimpleNamespace(value=value))
    triton_op = custom_op  # triton_op would look for kernels in the function, and warn that it cannot

"""Finds every kernel: each module of this package that defines SPEC."""

import importlib
import pkgutil
from pathlib import Path

from .spec import KernelSpec


def find_specs() -> dict[str, KernelSpec]:
    """Import the package's modules and return their SPECs by name; two SPECs of one name are an error."""
    found: dict[str, KernelSpec] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name == "registry":
            continue
        spec = getattr(importlib.import_module(f".{module.name}", __package__), "SPEC", None)
        if spec is None:
            continue
        if spec.name in found:
            raise ValueError(f"two kernels are named {spec.name!r}; give kernels/{module.name}.py another name")
        found[spec.name] = spec
    return found


REGISTRY: dict[str, KernelSpec] = find_specs()

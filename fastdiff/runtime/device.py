"""What `auto` means for device, precision and kernels; the switches of PyTorch's backends; what the device is."""

import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch._functorch.config

from fastdiff._kernels import TRITON_INSTALLED
from fastdiff.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
REPO = Path(__file__).resolve().parents[2]


def resolve_device(device: str) -> torch.device:
    """`auto` is cuda if there is one. Raises UserError for cuda without a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is 'cuda', but torch sees no CUDA device; use --device cpu or auto.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Model of the GPU, or of the CPU with its number of cores: two of one name may compare absolute times."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {_cpu_name()} {os.cpu_count()}c"


def slug(name: str) -> str:
    """A device's name as a file name: nvidia-h100-80gb-hbm3, cpu-amd-epyc-2c."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on, to stand beside it: device, versions, commit and date, as JSON types."""
    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        if cuda
        else None,
        "cuda": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        "triton": version("triton") if TRITON_INSTALLED else None,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def memory_peak(device: torch.device) -> tuple[str, int]:
    """What was measured, and its peak in bytes since the process began."""
    if device.type == "cuda":
        return "gpu allocated", torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return "host resident", unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    if names:
        return names[0].strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()  # a Mac


def _commit() -> str:
    """The commit of this code; `unknown` where it is installed, also within another repository."""
    if not _output("git", "ls-files", __file__):
        return "unknown"
    dirty = "+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else ""
    return _output("git", "rev-parse", "--short=12", "HEAD") + dirty


def _output(*command: str) -> str:
    """What a command prints, or an empty string where there is no such command or it fails."""
    try:
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def compile_options() -> dict[str, Any]:
    """Of torch.compile: small kernels that do not need each other's results are launched as one, up to 16 together.

    Above all the sums over the images of a hundred parameters' gradients. PyTorch 2.11 takes 8, whatever one says.
    """
    import torch._inductor.config  # takes seconds, and most commands compile nothing

    most = {"combo_kernel_max_num_nodes": 16} if hasattr(torch._inductor.config, "combo_kernel_max_num_nodes") else {}
    return {"combo_kernels": True, **most}


def compiled(fn: Callable[P, R]) -> Callable[P, R]:
    """torch.compile, as one graph; on a GPU with small kernels merged."""
    return torch.compile(fn, fullgraph=True, options=compile_options())


def check_triton(kernels: str, compiled: bool, device: torch.device) -> None:
    """Raise UserError where what was resolved needs Triton, and it is not installed."""
    if TRITON_INSTALLED:
        return
    if kernels == "triton":
        raise UserError("--kernels triton needs Triton, which is not installed here: use --kernels torch.")
    if compiled and device.type == "cuda":
        raise UserError("--compile on needs Triton on CUDA, and it is not installed here: use --compile off.")


@contextmanager
def tf32(enabled: bool) -> Generator[None]:
    """Inside, factors of float32 products, convolutions too, are rounded to TF32 (10 bits of mantissa) where the device
    can, which most CPUs cannot."""
    if not enabled:
        yield
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


def set_backends(device: torch.device, *, deterministic: bool = False) -> None:
    """Settings of the whole process, which no step may depend on silently.

    cuDNN measures its algorithms once for each shape, as shapes never change. Float32 products are float32, but in
    `tf32`: PyTorch would round convolutions, and only these, to TF32.

    Args:
        deterministic: only algorithms that give the same bits in every run on one GPU; an operation that has none
            raises RuntimeError. To be called before the process uses the GPU.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    if deterministic != torch.are_deterministic_algorithms_enabled():  # to ask costs nothing, to set imports a compiler
        torch.use_deterministic_algorithms(deterministic)
    # Else a graph with an autograd.Function is traced anew in every process. Its code is part of the cache's key.
    flag = "autograd_cache_allow_custom_autograd_functions"  # not a public one: a later PyTorch may lack it
    if hasattr(torch._functorch.config, flag):
        setattr(torch._functorch.config, flag, True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may split sums as streams allow
        # A debugging aid, at the price of a pass over each new tensor.
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010

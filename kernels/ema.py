# ty: ignore[invalid-argument-type]  Triton's stubs do not describe how one kernel calls another
"""The exponential moving average of the weights, one launch for the whole model.

    ema <- ema + (1 - decay) * (param - ema)

An elementwise kernel does 3 flops for 12 bytes (read ema and param, write ema), so memory sets its time; a loop over a
model's few hundred parameters would spend more time on launches. Hence the flat buffers: all parameters of a model are
views into one 1-D tensor, and so are their averages.

The update is in float32: in bf16 (8 bits) an average at decay 0.9999 would never move.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .language import tl, triton, triton_op
from .launch import runs_triton, traceable
from .spec import Case, Inputs, Job, KernelSpec

# 8 elements a thread: two 16-byte loads in flight of each buffer. 4 warps; the grid of thousands fills any GPU.
BLOCK, WARPS = 1024, 4


def reference(ema: Tensor, params: Tensor, decay: Tensor) -> None:
    """The same in plain PyTorch."""
    ema.lerp_(params.to(ema.dtype), (1 - decay).to(ema.dtype).reshape(()))


@triton.jit
def blend(ema, param, decay):
    """decay * ema + (1 - decay) * param in float32; decay a scalar in fp32 or fp64.

    1 - decay in the scalar's own precision: exact in fp32 for decay >= 1/2, and fp64 keeps 0.9999 itself exact too. Of
    two forms the one with the smaller correction is taken, as torch.lerp does, so that decay 0 copies exactly.
    """
    step = param - ema
    return tl.where(decay > 0.5, ema + (1.0 - decay).to(tl.float32) * step, param - decay.to(tl.float32) * step)


@triton.jit
def ema_kernel(
    ema_ptr,  # (n,) fp32, read and written
    param_ptr,  # (n,) fp32, bf16 or fp16
    decay_ptr,  # (1,) fp32 or fp64
    n,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]; 64 bits: n may exceed 2^31
    ok = i < n  # the last block is ragged
    ema = tl.load(ema_ptr + i, mask=ok)
    param = tl.load(param_ptr + i, mask=ok).to(tl.float32)
    tl.store(ema_ptr + i, blend(ema, param, tl.load(decay_ptr)), mask=ok)


@triton_op("fastdiff_kernels::ema_update_", mutates_args={"ema"})
def _update(ema: Tensor, params: Tensor, decay: Tensor) -> None:
    n = ema.numel()
    if not runs_triton(ema):
        reference(ema, params, decay)
    elif n > 0:
        traceable(ema_kernel)[(triton.cdiv(n, BLOCK),)](ema, params, decay, n, BLOCK=BLOCK, num_warps=WARPS)


@_update.register_fake
def _(ema, params, decay):
    return None


@torch.no_grad()
def ema_update_(ema: Tensor, params: Tensor, decay: Tensor) -> None:
    """`ema += (1 - decay) * (params - ema)` in place, in one launch.

    ema     (n,) fp32, contiguous
    params  (n,) fp32, bf16 or fp16, contiguous, not overlapping ema
    decay   one element on the same device, fp32 or fp64, in [0, 1]; a tensor, so that a captured graph can warm it up

    Raises ValueError for shapes, strides or devices, TypeError for dtypes. Source: Ho et al., 2020, appendix B, which
    takes decay 0.9999.
    """
    if ema.shape != params.shape or not (ema.is_contiguous() and params.is_contiguous()):
        raise ValueError(
            f"ema and params must be contiguous and of one shape, got {tuple(ema.shape)}, {tuple(params.shape)}"
        )
    if decay.numel() != 1 or not ema.device == params.device == decay.device:
        raise ValueError(
            f"decay must be one element on {ema.device}, as ema and params, got {decay.numel()} on {decay.device}"
        )
    if ema.dtype != torch.float32 and (ema.dtype != torch.float64 or runs_triton(ema)):
        raise TypeError(f"ema must be float32, got {ema.dtype}: a narrower average does not move")
    if not params.is_floating_point() or decay.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"params must be floating point and decay float32 or float64, got {params.dtype}, {decay.dtype}"
        )
    _update(ema, params, decay)


def _case(n: int, decay: float, *, wide: bool = False) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        ema, params = torch.randn(2, n, generator=generator).unbind()
        factor = torch.tensor(decay, dtype=torch.float64 if wide else torch.float32)
        return {"ema": ema.clone(), "params": params.to(dtype), "decay": factor}

    return Case(f"n={n}, decay={decay}" + (" in float64" if wide else ""), make)


def _jobs() -> Iterator[Job]:
    buffers = frozenset({"ema_ptr", "param_ptr"})
    types = dict.fromkeys(sorted(buffers), "*fp32") | {"decay_ptr": "*fp32", "n": "i32"}
    yield Job("35.7 M parameters", f"{__name__}:ema_kernel", types, {"BLOCK": BLOCK}, WARPS, buffers, frozenset({"n"}))


SPEC = KernelSpec(
    name="ema_update",
    op=ema_update_,
    reference=reference,
    cases=(_case(1, 0.5), _case(1000, 0.9999), _case(4096, 0.9999, wide=True), _case(5003, 0.0), _case(0, 0.9)),
    dtypes=(torch.float32, torch.bfloat16),
    min_bytes=lambda inputs: (2 * inputs["ema"].nbytes + inputs["params"].nbytes, 0),
    category="optimizer",
    mutates=("ema",),
    jobs=_jobs,
)

# ty: ignore[invalid-argument-type]  Triton's stubs do not describe how one kernel calls another
"""Gradient clipping, AdamW, EMA and the bf16 weights for the next forward in one pass: 38 bytes a parameter.

    g <- clip * grad
    m <- m + (1 - beta1) (g - m)                 v <- beta2 v + (1 - beta2) g^2
    p <- p - lr * weight_decay * p
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    ema <- ema + (1 - decay) (p - ema)           half <- bf16(p)

Kingma and Ba, 2015 (Adam); Loshchilov and Hutter, 2019 (AdamW: decoupled decay; 0 makes it Adam). The pass reads p,
grad, m, v, ema and writes p, m, v, ema in float32 (36 bytes) and half in bf16 (2); one after the other, clip (12),
Adam (28), average (12) and cast (6) move 58. Weights, moments and average stay in float32, as bf16 would swallow small
steps. One thread computes an element, in a fixed order: two runs agree bit for bit.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .ema import blend
from .language import tl, triton, triton_op
from .launch import runs_triton, traceable
from .spec import Case, Inputs, Job, KernelSpec

# 8 elements a thread in 6 streams: 16-byte accesses also of the bf16 copy (8 x 2 bytes); 70 registers, so that 7
# programs an SM keep enough loads in flight.
BLOCK, WARPS = 1024, 4


def reference(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, half: Tensor | None, *,
              step: Tensor, lr: Tensor, decay: Tensor, clip: Tensor, beta1: float = 0.9, beta2: float = 0.999,
              eps: float = 1e-8, weight_decay: float = 0.0) -> None:  # fmt: skip
    """The same in plain PyTorch: torch.optim.AdamW's operations in its order, then the average and the copy."""
    lr, decay, clip, step = (v.reshape(()).to(torch.float64) for v in (lr, decay, clip, step))
    dtype = param.dtype
    g = grad.to(dtype) * clip.to(dtype)
    m = exp_avg.lerp(g, 1 - beta1)
    v = (exp_avg_sq * beta2).addcmul(g, g, value=1 - beta2)
    denominator = v.sqrt() / (1 - beta2**step).sqrt().to(dtype) + eps
    p = param * (1 - lr * weight_decay).to(dtype) - (lr / (1 - beta1**step)).to(dtype) * m / denominator
    average = ema.lerp(p, (1 - decay).to(dtype))
    written = [(exp_avg, m), (exp_avg_sq, v), (param, p), (ema, average)]
    if half is not None:
        written.append((half, p.to(half.dtype)))
    for old, new in written:
        old.copy_(torch.where(clip > 0, new, old))


@triton.jit
def one_minus_exp(u):
    """1 - exp(-u) for u >= 0 in float32, to 1e-6 relative: the plain difference loses 4 digits at u = 1e-3 (step 1)."""
    series = u * (1 - u / 2 * (1 - u / 3 * (1 - u / 4 * (1 - u / 5 * (1 - u / 6)))))  # error below u^6 / 5040
    return tl.where(u < 0.25, series, 1 - tl.exp(-u))


@triton.jit
def adam_ema_kernel(
    param_ptr,  # (n,) fp32, read and written
    grad_ptr,  # (n,) fp32 or bf16
    exp_avg_ptr,  # (n,) fp32, read and written: m
    exp_avg_sq_ptr,  # (n,) fp32, read and written: v
    ema_ptr,  # (n,) fp32, read and written
    half_ptr,  # (n,) bf16 or fp16, written; or None
    step_ptr,  # (1,) t = 1, 2, ...
    lr_ptr,  # (1,)
    decay_ptr,  # (1,)
    clip_ptr,  # (1,)
    n,
    BETA1: tl.constexpr,  # constexpr, so that 1 - beta is formed in Python's double precision: in
    BETA2: tl.constexpr,  # float32, 1 - 0.999 is wrong by 5e-5 of itself
    RATE1: tl.constexpr,  # -log(beta1)
    RATE2: tl.constexpr,  # -log(beta2)
    EPS: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]; 64 bits: n may exceed 2^31
    ok = i < n
    t = tl.load(step_ptr).to(tl.float32)
    lr = tl.load(lr_ptr).to(tl.float32)
    clip = tl.load(clip_ptr).to(tl.float32)
    if not (clip > 0.0):  # one scalar for the whole program
        return
    correction1 = one_minus_exp(t * RATE1)  # 1 - beta1^t
    correction2 = tl.sqrt_rn(one_minus_exp(t * RATE2))

    g = tl.load(grad_ptr + i, mask=ok, other=0.0).to(tl.float32) * clip
    p = tl.load(param_ptr + i, mask=ok, other=0.0)
    m = tl.load(exp_avg_ptr + i, mask=ok, other=0.0)
    v = tl.load(exp_avg_sq_ptr + i, mask=ok, other=0.0)
    ema = tl.load(ema_ptr + i, mask=ok, other=0.0)

    m = m + (1.0 - BETA1) * (g - m)
    v = BETA2 * v + (1.0 - BETA2) * (g * g)
    if WEIGHT_DECAY != 0.0:
        p = p - lr * WEIGHT_DECAY * p
    p = p - (lr / correction1) * m / (tl.sqrt_rn(v) / correction2 + EPS)
    ema = blend(ema, p, tl.load(decay_ptr))

    tl.store(exp_avg_ptr + i, m, mask=ok)
    tl.store(exp_avg_sq_ptr + i, v, mask=ok)
    tl.store(param_ptr + i, p, mask=ok)
    tl.store(ema_ptr + i, ema, mask=ok)
    if half_ptr is not None:
        tl.store(half_ptr + i, p.to(half_ptr.dtype.element_ty), mask=ok)


def constants(beta1: float, beta2: float, eps: float, weight_decay: float) -> dict[str, float | int]:
    """The kernel's compile-time constants; they are fixed for a training run."""
    return {"BETA1": beta1, "BETA2": beta2, "RATE1": -math.log(beta1), "RATE2": -math.log(beta2), "EPS": eps,
                "WEIGHT_DECAY": weight_decay, "BLOCK": BLOCK, "num_warps": WARPS}  # fmt: skip


@triton_op("fastdiff_kernels::adam_ema_", mutates_args={"param", "exp_avg", "exp_avg_sq", "ema", "half"})
def _step(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, half: Tensor | None,
          step: Tensor, lr: Tensor, decay: Tensor, clip: Tensor, beta1: float, beta2: float, eps: float,
          weight_decay: float) -> None:  # fmt: skip
    n = param.numel()
    if not runs_triton(param):
        reference(param, grad, exp_avg, exp_avg_sq, ema, half, step=step, lr=lr, decay=decay, clip=clip, beta1=beta1,
                  beta2=beta2, eps=eps, weight_decay=weight_decay)  # fmt: skip
    elif n > 0:
        traceable(adam_ema_kernel)[(triton.cdiv(n, BLOCK),)](
            param, grad, exp_avg, exp_avg_sq, ema, half, step, lr, decay, clip, n,
            **constants(beta1, beta2, eps, weight_decay),
        )  # fmt: skip


@_step.register_fake
def _(param, grad, exp_avg, exp_avg_sq, ema, half, step, lr, decay, clip, beta1, beta2, eps, weight_decay):
    return None


@torch.no_grad()
def adam_ema_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, half: Tensor | None, *,
              step: Tensor, lr: Tensor, decay: Tensor, clip: Tensor, beta1: float = 0.9, beta2: float = 0.999,
              eps: float = 1e-8, weight_decay: float = 0.0) -> None:  # fmt: skip
    """One optimizer step over flat buffers, in place.

    param, exp_avg, exp_avg_sq, ema   (n,) fp32, contiguous, not overlapping; the moments start as zeros, ema
                  as a copy of param
    grad          (n,) fp32, bf16 or fp16, contiguous; read only
    half          (n,) bf16 or fp16 copy of the new param, written; or None
    step          t = 1 at the first update (any integer or floating dtype), raised by the caller; exact up to 2^24
    lr            learning rate
    decay         of the average, in [0, 1]; see ema_update_
    clip          factor on the gradient, e.g. min(1, max_norm / norm); with one that is not above 0, or NaN, nothing is
                  written, so that a gradient that is not finite can be skipped without a read on the host
    beta1, beta2  in (0, 1)
    weight_decay  decoupled, as torch.optim.AdamW's

    step, lr, decay and clip are tensors of one element on the same device (floating ones fp32 or fp64), so that a
    captured CUDA graph reads what the trainer writes there.

    Raises ValueError for shapes, strides, devices or betas, TypeError for dtypes.
    """
    state = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema}
    for name, v in {**state, "grad": grad, **({} if half is None else {"half": half})}.items():
        if v.shape != param.shape or v.device != param.device or not v.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and {tuple(param.shape)} on {param.device}, as param; "
                f"got {tuple(v.shape)} on {v.device}"
            )
        if name in state and v.dtype != torch.float32 and (v.dtype != torch.float64 or runs_triton(v)):
            raise TypeError(f"{name} must be float32, got {v.dtype}")
        if not v.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {v.dtype}")
    for name, v in {"step": step, "lr": lr, "decay": decay, "clip": clip}.items():
        if v.numel() != 1 or v.device != param.device:
            raise ValueError(f"{name} must be one element on {param.device}, got {v.numel()} on {v.device}")
        if name != "step" and v.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {v.dtype}")
    if not (0 < beta1 < 1 and 0 < beta2 < 1):
        raise ValueError(f"beta1 and beta2 must be in (0, 1), got {beta1} and {beta2}")
    _step(param, grad, exp_avg, exp_avg_sq, ema, half, step, lr, decay, clip, beta1, beta2, eps, weight_decay)


def _case(n: int, step: int, *, half: bool = True, **plain: float) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        param, grad, exp_avg, exp_avg_sq, ema = torch.randn(5, n, generator=generator).unbind()
        first = 0.0 if step == 1 else 0.1  # the moments are zero before the first step
        inputs: Inputs = {
            "param": param.clone(),
            "grad": grad.to(dtype),
            "exp_avg": exp_avg * first,
            "exp_avg_sq": (exp_avg_sq * first).square(),
            "ema": ema.clone(),
            "half": torch.zeros(n, dtype=torch.bfloat16) if half else None,
            "step": torch.tensor(step),
        }
        scalars = {"lr": 2e-4, "decay": 0.9999, "clip": 0.7}
        return inputs | {key: torch.tensor(value, dtype=torch.float64) for key, value in scalars.items()} | plain

    return Case(f"n={n}, step={step}" + "".join(f", {k}={v}" for k, v in plain.items()), make)


def _min_bytes(inputs: Inputs) -> tuple[int, int]:
    state = sum(inputs[name].nbytes for name in ("param", "exp_avg", "exp_avg_sq", "ema"))
    return 2 * state + inputs["grad"].nbytes + (0 if inputs["half"] is None else inputs["half"].nbytes), 0


def _jobs() -> Iterator[Job]:
    state = ("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "ema_ptr")
    types = dict.fromkeys((*state, "grad_ptr", "lr_ptr", "decay_ptr", "clip_ptr", "step_ptr"), "*fp32")
    types |= {"half_ptr": "*bf16", "n": "i32"}
    fixed, wide = constants(0.9, 0.999, 1e-8, 0.0), frozenset({*state, "grad_ptr", "half_ptr"})
    for label, other_types, other_constants in (
        ("35.7 M parameters", {}, {}), ("bf16 gradient, weight decay", {"grad_ptr": "*bf16"}, {"WEIGHT_DECAY": 0.01}),
    ):  # fmt: skip
        yield Job(label, f"{__name__}:adam_ema_kernel", types | other_types, fixed | other_constants, WARPS, wide,
                  frozenset({"n"}))  # fmt: skip


SPEC = KernelSpec(
    name="adam_ema",
    op=adam_ema_,
    reference=reference,
    cases=(
        _case(1000, 1),
        _case(4096, 100, weight_decay=0.01),
        _case(1025, 800_000, half=False),
        _case(1, 2, beta1=0.5, beta2=0.9),
        _case(0, 1),
    ),
    dtypes=(torch.float32, torch.bfloat16),
    min_bytes=_min_bytes,
    category="optimizer",
    jobs=_jobs,
    mutates=("param", "exp_avg", "exp_avg_sq", "ema", "half"),
)

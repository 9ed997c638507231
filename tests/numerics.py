"""The one tolerance rule of the project: a fused kernel may err 4 times as much as plain PyTorch does, and one ulp."""

import torch
from torch import Tensor

FACTOR = 4


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype`'s numbers at each |x|, as float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double().abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(x, info.eps / 2, dtype=torch.float64), exponent)


def assert_as_accurate(fused: Tensor, eager: Tensor, exact: Tensor, what: str = "result") -> None:
    """Fail unless |fused - exact| <= 4 max |eager - exact| + ulp(exact), element by element.

    fused  the result under test, in its own dtype (whose ulp is granted)
    eager  the same by the plain PyTorch composition from the same inputs in the same dtype
    exact  the same by that composition in float64, from the same inputs widened
    The non-finite elements of `fused` must be those of `eager`, NaN for NaN and infinity for infinity of the same sign.
    """
    assert fused.shape == eager.shape == exact.shape, f"{what}: shapes {fused.shape}, {eager.shape}, {exact.shape}"
    assert exact.dtype == torch.float64, f"{what}: the exact result must be float64, got {exact.dtype}"
    if fused.numel() == 0:
        return
    f, e = fused.detach().double(), eager.detach().double()
    finite = e.isfinite()
    assert torch.equal(f.nan_to_num(0, 1, -1)[~finite], e.nan_to_num(0, 1, -1)[~finite]), (
        f"{what}: other non-finite values"
    )
    assert torch.equal(f.isnan(), e.isnan()), f"{what}: other NaNs"
    assert torch.equal(f.isfinite(), finite), f"{what}: other infinities"
    f, e, x = f[finite], e[finite], exact.detach()[finite]
    if f.numel() == 0:
        return
    allowed = FACTOR * (e - x).abs().max() + ulp(x, fused.dtype)
    excess = ((f - x).abs() / allowed).max().item()
    assert excess <= 1, (
        f"{what}: error {excess:.2f} times the allowed one (largest errors: ours {(f - x).abs().max():.2e}, "
        f"plain PyTorch {(e - x).abs().max():.2e}; largest value {x.abs().max():.2e}, {fused.dtype})"
    )


class Float64(torch.nn.Module):
    """A network in float64 behind a float32 interface."""

    def __init__(self, net):
        super().__init__()
        self.net = net.double()

    def forward(self, x, t):
        return self.net(x.double(), t)

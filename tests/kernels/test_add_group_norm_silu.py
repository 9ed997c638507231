"""add_group_norm_silu beyond its contract: drawn shapes, results that nobody uses, and what it refuses."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import REGISTRY, add_group_norm_silu, group_norm_silu
from kernels.add_group_norm_silu import _case
from kernels.launch import INTERPRETED
from tests.kernels.contract import check, copy

DRAWN = 10 if INTERPRETED else 25  # the interpreter takes seconds for each
SPEC = REGISTRY["add_group_norm_silu"]


def drawn(case, dtype=torch.float32):
    return case.make(dtype, torch.Generator().manual_seed(0))


@st.composite
def cases(draw):
    channels, c_skip = draw(st.integers(1, 128)), draw(st.sampled_from([0, 1, 8, 24, 32, 64, 99]))
    total = channels + c_skip
    groups = draw(st.sampled_from([g for g in range(1, total + 1) if total % g == 0]))
    n, h, w = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    extras = tuple(name for name in ("residual", "shift") if draw(st.booleans()))
    plain = {"activation": draw(st.sampled_from(["silu", "none"]))}
    case = _case("drawn", n, channels, h, w, groups, c_skip=c_skip, extras=extras, **plain)
    return case, draw(st.sampled_from(SPEC.dtypes))


@settings(max_examples=DRAWN, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn_=cases())
def test_drawn_shapes(drawn_, device):
    case, dtype = drawn_
    check(SPEC, drawn(case, dtype), device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("c", "c_skip", "side"),
    [(128, 0, 32), (128, 128, 32), (256, 128, 32), (256, 256, 16), (256, 128, 16), (256, 256, 8), (256, 256, 4)],
)
def test_unet_shapes_at_batch_128(c, c_skip, side):
    case = _case("unet", 128, c, side, side, 32, c_skip=c_skip, extras=("residual", "shift"))
    check(SPEC, drawn(case, torch.bfloat16), torch.device("cuda"))


@pytest.mark.parametrize("side", [4, 20])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_results_that_nobody_uses_have_no_gradient(used, side, device):
    """And where the norm is not used, neither have its parameters."""
    case = _case("case", 2, 24, side, side, 1, c_skip=8, extras=("residual", "shift"))
    gradients = []
    for fn in (add_group_norm_silu, SPEC.reference):
        inputs = copy(drawn(case), device, wide=fn is SPEC.reference)
        names = [name for name in SPEC.differentiable if name in inputs]
        leaves = [inputs[name].requires_grad_() for name in names]
        results = fn(**inputs)
        total = sum((results[i].square().sum() for i in used), torch.zeros((), device=device))
        gradients.append(torch.autograd.grad(total, leaves, allow_unused=True))
    assert [g is None for g in gradients[0]] == [g is None for g in gradients[1]]
    for name, mine, exact in zip(names, *gradients, strict=True):
        if mine is None:
            continue
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4, msg=name)


def test_the_sum_is_given_out_twice_in_one_memory(device):
    y, u, again = add_group_norm_silu(**copy(drawn(_case("case", 2, 32, 4, 4, 4, extras=("residual",))), device))
    assert torch.equal(u, again)
    assert u.data_ptr() == again.data_ptr()
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in (y, u, again))


@pytest.mark.parametrize("side", [4, 20])
def test_the_norm_is_of_the_rounded_sum(side, device):
    """As the backward will see it: with a large mean the rounding is much of the variance."""
    inputs = copy(drawn(_case("case", 2, 32, side, side, 1, extras=("residual",)), torch.bfloat16), device)
    inputs["x"] += 300
    y, u, _ = add_group_norm_silu(**inputs)
    del inputs["x"], inputs["residual"]
    assert torch.equal(y, group_norm_silu(u, **inputs))


def in_a_larger_matrix(v, before):
    """The same numbers as rows that start `before` elements into those of a matrix."""
    return torch.cat([torch.full_like(v[:, :1], 7.0).expand(-1, before), v, v], 1)[:, before : before + v.shape[1]]


@pytest.mark.parametrize("side", [5, 20])
@pytest.mark.parametrize("layout", ["a slice", "expanded", "columns apart"])
def test_a_shift_of_any_layout_is_taken(layout, side, device):
    """Values and gradients are those of contiguous rows, bit for bit."""
    outcomes = []
    for contiguous in (False, True):
        inputs = copy(drawn(_case("case", 3, 24, side, side, 1, c_skip=9, extras=("shift",))), device)
        leaf = (inputs["shift"][:1] if layout == "expanded" else inputs["shift"]).clone().requires_grad_()
        view = {
            "a slice": lambda v: in_a_larger_matrix(v, 3),
            "expanded": lambda v: v.expand(3, -1),
            "columns apart": lambda v: v.t().contiguous().t(),
        }[layout](leaf)
        inputs["shift"] = view.contiguous() if contiguous else view
        results = add_group_norm_silu(**inputs)
        outcomes.append([*results, *torch.autograd.grad([r.square().sum() for r in results], leaf)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_vectors_may_be_strided(device):
    inputs = copy(drawn(_case("case", 2, 32, 5, 5, 4)), device)
    y, *_ = add_group_norm_silu(**inputs)
    for name in ("weight", "bias"):
        inputs[name] = torch.stack([inputs[name], inputs[name] + 5], 1)[:, 0]
    assert torch.equal(add_group_norm_silu(**inputs)[0], y)
    assert torch.equal(group_norm_silu(**inputs), y)


def test_a_16_bit_biass_gradient_is_added_up_in_float32(device):
    """Shares of the images that were rounded first would lose what is left of terms that cancel."""
    case = _case("case", 64, 8, 8, 8, 2, extras=("shift",))
    inputs = copy(drawn(case, torch.bfloat16), device)
    inputs["shift"] = inputs["shift"][0].clone().requires_grad_()
    weight = torch.randn(64, 8, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    weight = (weight - weight.float().mean((0, 2, 3), keepdim=True).bfloat16()).to(memory_format=torch.channels_last)
    _, u, _ = add_group_norm_silu(**inputs)
    (mine,) = torch.autograd.grad(u, inputs["shift"], weight)
    torch.testing.assert_close(mine.float(), weight.float().sum((0, 2, 3)), rtol=0.01, atol=0.01)


def test_with_nothing_to_add_it_is_the_norm(device):
    inputs = copy(drawn(_case("case", 2, 32, 4, 4, 4)), device)
    y, u, _ = add_group_norm_silu(**inputs)
    assert torch.equal(y, group_norm_silu(**inputs))
    assert torch.equal(u, inputs["x"])
    assert u.data_ptr() != inputs["x"].data_ptr()


def test_a_bias_is_every_images_shift(device):
    inputs = copy(drawn(_case("case", 3, 32, 4, 4, 4, c_skip=8, extras=("shift",))), device)
    bias = inputs.pop("shift")[0].clone().requires_grad_()
    rows = bias.detach().expand(3, -1).clone().requires_grad_()
    one, each = (add_group_norm_silu(**inputs, shift=v) for v in (bias, rows))
    assert all(torch.equal(a, b) for a, b in zip(one, each, strict=True))
    (d_bias,) = torch.autograd.grad([one[0].square().sum()], bias)
    (d_rows,) = torch.autograd.grad([each[0].square().sum()], rows)
    torch.testing.assert_close(d_bias, d_rows.sum(0))


def image(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"\(N, C, H, W\)", {"x": torch.ones(2, 32)}),
        (ValueError, r"residual must be \(2, 32, 4, 4\)", {"residual": image(2, 16, 4, 4)}),
        (ValueError, r"skip must be \(2, C2, 4, 4\)", {"skip": image(2, 8, 4, 8)}),
        (ValueError, r"skip must be \(2, C2, 4, 4\)", {"skip": torch.ones(8)}),
        (ValueError, r"skip must be \(2, C2, 4, 4\)", {"skip": image(2, 0, 4, 4)}),
        (ValueError, "divide the 40 channels of x and skip", {"skip": image(2, 8, 4, 4), "num_groups": 3}),
        (ValueError, r"weight must be \(40,\)", {"skip": image(2, 8, 4, 4)}),
        (ValueError, "residual of shape .* channels_last", {"residual": torch.ones(2, 32, 4, 4)}),
        (TypeError, "skip must have x's dtype", {"skip": image(2, 32, 4, 4, dtype=torch.bfloat16)}),
        (ValueError, r"shift must be \(2, 32\) or \(32,\)", {"shift": torch.ones(2, 40)}),
        (ValueError, r"bias must be \(32,\)", {"bias": torch.ones(2, 32)}),
        (ValueError, "divide the 32 channels", {"num_groups": 5}),
    ],
)
def test_refusals_name_the_argument(error, message, change):
    inputs = {"x": image(2, 32, 4, 4), "weight": torch.ones(32), "bias": torch.zeros(32), "num_groups": 4} | change
    if "skip" in change and error is TypeError:
        inputs |= {"weight": torch.ones(64), "bias": torch.zeros(64)}
    elif "skip" in change and "weight" not in message:
        inputs |= {"weight": torch.ones(40), "bias": torch.zeros(40)}
    with pytest.raises(error, match=message):
        add_group_norm_silu(**inputs)

"""group_norm_silu beyond its contract: drawn shapes, hard inputs, dropout, autocast, and what it refuses."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernels
from kernels import REGISTRY, group_norm_silu
from kernels.group_norm_silu import _case, reference
from kernels.launch import INTERPRETED, norm_tiles, power_of_2
from tests.kernels.contract import check, outcome

DRAWN = 10 if INTERPRETED else 25  # the interpreter takes seconds for each
SPEC = REGISTRY["group_norm_silu"]


def image(*shape, device="cpu", dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)


def affine(channels, device="cpu"):
    return torch.ones(channels, device=device), torch.zeros(channels, device=device)


@st.composite
def cases(draw):
    channels = draw(st.integers(32, 256))
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    n, h, w = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    extras = tuple(name for name in ("shift", "scale", "offset", "seed") if draw(st.booleans()))
    plain = {"activation": draw(st.sampled_from(["silu", "none"]))} | ({"dropout_p": 0.3} if "seed" in extras else {})
    return _case("drawn", n, channels, h, w, groups, extras=extras, **plain), draw(st.sampled_from(SPEC.dtypes))


@settings(max_examples=DRAWN, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=cases())
def test_drawn_shapes(drawn, device):
    case, dtype = drawn
    check(SPEC, case.make(dtype, torch.Generator().manual_seed(0)), device)


@pytest.mark.parametrize(
    ("n", "c", "h", "w", "groups"),
    [
        (1, 1024, 2, 2, 32),
        (1, 1024, 1, 1, 1),
        (1, 1000, 3, 1, 1000),
        (1, 36, 5, 5, 3),
        (1, 32, 64, 64, 8),
        (1, 64, 64, 64, 1),
        (2, 384, 4, 4, 32),
    ],
)
def test_edges_of_the_shapes(n, c, h, w, groups, device):
    check(
        SPEC,
        _case("edge", n, c, h, w, groups, extras=("shift",)).make(torch.bfloat16, torch.Generator().manual_seed(0)),
        device,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("c", "side"), [(128, 32), (256, 32), (384, 32), (512, 16), (256, 8), (512, 4)])
def test_unet_shapes_at_batch_128(c, side):
    case = _case("unet", 128, c, side, side, 32, extras=("shift", "seed"), dropout_p=0.1)
    check(SPEC, case.make(torch.bfloat16, torch.Generator().manual_seed(0)), torch.device("cuda"))


@pytest.mark.gpu
def test_compiled_weight_gradient_with_4_channels_a_group(compiled):
    """PyTorch issue 140913: stock group_norm under compile gave a silently wrong weight gradient in this case."""
    case = _case("issue 140913", 128, 128, 32, 32, 32)
    fn = torch.compile(lambda **inputs: group_norm_silu(**inputs), fullgraph=True)
    check(SPEC, case.make(torch.bfloat16, torch.Generator().manual_seed(0)), torch.device("cuda"), fn=fn)


@pytest.mark.parametrize("pixels", [(8, 8), (20, 24)])
def test_a_large_mean_costs_no_accuracy(pixels, device):
    """E[x^2] - E[x]^2 in float32 would lose all digits of the variance here."""
    inputs = _case("mean", 1, 32, *pixels, 2, extras=("shift",)).make(torch.float32, torch.Generator().manual_seed(0))
    inputs["x"] += 5000
    check(SPEC, inputs, device)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pixels", [(4, 4), (3, 5)])
def test_non_finite_input_gives_pytorchs_pattern(bad, pixels, device):
    inputs = _case("bad", 2, 48, *pixels, 4, extras=("shift", "seed"), dropout_p=0.5).make(
        torch.float32, torch.Generator().manual_seed(0)
    )
    inputs["x"][1, 13, 2, 2] = bad  # one group of one image
    y = outcome(
        SPEC,
        group_norm_silu,
        {**inputs, "x": inputs["x"].to(device)}
        | {k: v.to(device) for k, v in inputs.items() if isinstance(v, torch.Tensor)},
        torch.ones_like(inputs["x"]),
    )["result 0"]
    assert y.isnan().sum() == 12 * pixels[0] * pixels[1]
    check(SPEC, inputs, device)


def test_dropout_drops_the_stated_share_and_keeps_the_mean(device):
    x, (weight, bias) = (
        torch.ones(4, 64, 16, 16, device=device).to(memory_format=torch.channels_last),
        affine(64, device),
    )
    bias += 1  # the norm of a constant is 0, so y is 1 before dropout
    y = group_norm_silu(x, weight, bias, 8, activation="none", dropout_p=0.3, seed=torch.tensor([7], device=device))
    kept = (y != 0).float().mean().item()
    assert abs(kept - 0.7) < 4 * (0.3 * 0.7 / y.numel()) ** 0.5
    assert abs(y[y != 0].mean().item() * (1 - 0.3) - 1) < 1e-4
    for axis in range(4):  # no axis sees the same mask twice
        rows = (y != 0).transpose(0, axis).flatten(1)
        assert len(rows.unique(dim=0)) == len(rows)


def test_dropout_masks_follow_seed_and_stream(device):
    x, (weight, bias) = image(2, 32, 8, 8, device=device), affine(32, device)

    def mask(seed, stream=0):
        return (
            group_norm_silu(x, weight, bias, 4, dropout_p=0.5, seed=torch.tensor(seed, device=device), stream=stream)
            == 0
        )

    assert torch.equal(mask(1), mask(1))
    others = [mask(2), mask(1, stream=1), mask(1 + 2**40)]
    for other in others:
        assert 0.4 < (mask(1) ^ other).float().mean() < 0.6


def test_the_dropout_mask_is_the_same_on_every_path(device):
    """The position alone decides: a tile of another shape, the other device and the reference draw the same mask."""
    x, (weight, bias) = image(2, 48, 8, 8), affine(48)
    seed = torch.tensor([2**62 + 12345])
    expected = reference(x, weight, bias, 4, dropout_p=0.5, seed=seed, stream=5) == 0
    for groups in (1, 4, 48):
        y = group_norm_silu(
            x.to(device), weight.to(device), bias.to(device), groups, dropout_p=0.5, seed=seed.to(device), stream=5
        )
        assert torch.equal((y == 0).cpu(), expected)


def test_autocast_keeps_the_input_dtype(device):
    weight, bias = affine(32, device)
    for dtype in (torch.bfloat16, torch.float32):
        x = image(1, 32, 4, 4, device=device, dtype=dtype)
        with torch.autocast(device.type, torch.bfloat16):
            y = group_norm_silu(x, weight, bias, 4)
        assert y.dtype == dtype
        assert torch.equal(y, group_norm_silu(x, weight, bias, 4))


def test_the_result_is_channels_last_and_any_gradient_layout_is_taken(device):
    x, (weight, bias) = image(2, 32, 4, 4, device=device).requires_grad_(), affine(32, device)
    y = group_norm_silu(x, weight, bias, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (from_sum,) = torch.autograd.grad(y.sum(), x, retain_graph=True)  # an expanded gradient: strides 0
    (from_nchw,) = torch.autograd.grad(y, x, torch.ones(2, 32, 4, 4, device=device), retain_graph=True)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(from_sum, expected)
    assert torch.equal(from_nchw, expected)


def test_halves_of_a_chunk_are_taken(device):
    x, (weight, bias) = image(2, 32, 4, 4, device=device), affine(32, device)
    scale, offset = torch.randn(2, 64, device=device).chunk(2, dim=1)
    y = group_norm_silu(x, weight, bias, 4, scale=scale, offset=offset)
    assert torch.equal(y, group_norm_silu(x, weight, bias, 4, scale=scale.contiguous(), offset=offset.contiguous()))


X, W, B = image(2, 32, 4, 4), torch.ones(32), torch.zeros(32)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "channels_last", {"x": torch.ones(2, 32, 4, 4)}),
        (ValueError, r"\(N, C, H, W\)", {"x": torch.ones(2, 32)}),
        (TypeError, "bfloat16, float16 or float32", {"x": X.int()}),
        (ValueError, "divide the 32 channels", {"num_groups": 5}),
        (ValueError, "divide the 32 channels", {"num_groups": 0}),
        (ValueError, r"weight must be \(32,\)", {"weight": torch.ones(16)}),
        (ValueError, r"bias must be \(32,\)", {"bias": torch.ones(2, 32)}),
        (ValueError, r"shift must be \(2, 32\) or \(32,\)", {"shift": torch.ones(16)}),
        (TypeError, "scale must be floating", {"scale": torch.ones(2, 32, dtype=torch.int64)}),
        (ValueError, "activation", {"activation": "gelu"}),
        (ValueError, "dropout_p", {"dropout_p": 1.0}),
        (ValueError, "needs seed", {"dropout_p": 0.1}),
        (ValueError, "needs seed", {"dropout_p": 0.1, "seed": torch.tensor([1.0])}),
        (ValueError, "stream", {"stream": -1}),
    ],
)
def test_refusals_name_the_argument(error, message, change):
    with pytest.raises(error, match=message):
        group_norm_silu(**({"x": X, "weight": W, "bias": B, "num_groups": 4} | change))


@given(st.integers(32, 1024), st.integers(1, 4096), st.booleans(), st.booleans(), st.sampled_from([2, 4]), st.data())
def test_tiles_cover_every_channel_with_whole_groups(channels, pixels, backward, dropout, itemsize, data):
    groups = data.draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    t = norm_tiles(channels, pixels, groups, itemsize=itemsize, backward=backward, dropout=dropout)
    per_group = channels // groups
    assert t.channels % per_group == 0
    assert t.channels % 8 == 0 or t.channels == channels  # aligned rows, and Philox serves 8 channels a call
    assert t.channels <= t.block_c == power_of_2(t.block_c)
    assert t.channels // per_group <= t.block_g == power_of_2(t.block_g)
    assert t.block_hw == power_of_2(t.block_hw)
    assert t.looped or t.block_hw >= pixels
    assert 1 <= t.num_warps <= 16
    assert t.block_hw * t.block_c <= 64 * 32 * t.num_warps  # at most 64 elements a thread
    assert t.block_g * t.block_c <= 8192 * 8


def test_programs_load_ahead_where_shared_memory_suffices(monkeypatch):
    monkeypatch.setattr(kernels.launch, "NORM_TILES", {(128, 1024, 32, False, False): (16, 1024, 8, 2)})
    x = torch.empty(4, 128, 32, 32, dtype=torch.bfloat16)
    launch = sys.modules["kernels.group_norm_launch"]
    monkeypatch.setattr(launch, "gpu_limits", lambda device: (3, 100_000))  # two tiles have 65,536 bytes

    def grid_and_ahead(images):
        _, grid, constants = launch._meta(x, 128, 32, backward=False, dropout=False, adaptive=False, images=images)
        return grid, constants["AHEAD"]

    assert grid_and_ahead(1) == ((6,), True)
    assert grid_and_ahead(2) == ((32,), False)
    x = torch.empty(1, 128, 32, 32, dtype=torch.bfloat16)[:0]
    assert grid_and_ahead(1)[0] == (0,)

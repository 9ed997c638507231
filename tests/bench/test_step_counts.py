"""Bytes and launches of the generated code: the counter sees what it must, and the committed counts hold their bars."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench import inductor_mock, step_counts, step_variants
from bench.bars import COUNTED
from fastdiff.errors import UserError
from fastdiff.nets.layers import ResidualBlock
from fastdiff.nets.unet import UNet

known = pytest.mark.skipif(
    not torch.__version__.startswith(inductor_mock.TORCH), reason="the counter knows other versions of torch"
)


REACHED = {"2a": 1.54, "2b": 1.54, "3": 5.7}


@pytest.fixture(scope="module")
def committed(repo):
    path = repo / "bench" / "results" / "step_counts.json"
    if not path.exists():
        pytest.fail("bench/results/step_counts.json is missing; run python bench/step_counts.py")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def ours():
    return step_variants.count_small("ours")


@known
def test_an_elementwise_kernel_is_counted_to_the_byte():
    x = torch.empty(1024, 1024).requires_grad_()
    forward, backward = inductor_mock.count(lambda x: x.sin() * 2, [x])
    assert (forward.triton, forward.extern, forward.bytes) == (1, 0, 8 * x.numel())
    assert (backward.triton, backward.bytes) == (1, 12 * x.numel())


@known
def test_a_convolutions_backward_is_two_kernels_and_a_sum():
    last = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    x, weight = torch.empty(8, 64, 16, 16).to(**last), torch.empty(128, 64, 3, 3).to(**last)
    bias, dy = torch.empty(128, dtype=torch.bfloat16), 8 * 128 * 16 * 16 * 2
    inputs = [v.requires_grad_() for v in (x, weight, bias)]
    _, backward = inductor_mock.count(lambda *v: F.conv2d(*v, padding=1), inputs)
    *sums, library = backward.calls
    assert (library.read, library.written) == (2 * dy + x.nbytes + weight.nbytes, x.nbytes + weight.nbytes)
    assert (sums[0].read, sums[-1].written) == (dy, bias.nbytes)


@known
def test_dropout_is_counted():
    x = torch.empty(1024, 1024).requires_grad_()
    forward, backward = inductor_mock.count(lambda x: F.dropout(x, p=0.1), [x])
    assert forward.bytes + backward.bytes == pytest.approx(18 * x.numel(), rel=1e-3)  # x, y, dy, dx; the mask twice


def test_the_updates_bytes_a_parameter():
    n = sum(p.numel() for p in UNet(step_variants.SMALL).parameters())
    for variant, expected in (("ours", 42), ("stock", 52)):
        *_, moved = step_variants.optimizer_counts(variant, step_variants.SMALL)
        assert moved / n == pytest.approx(expected, rel=1e-3)


@known
def test_the_small_network_counts_as_committed(committed, ours):
    assert ours == committed["small"]["ours"], "the step changed: run python bench/step_counts.py and look at the bars"


@known
def test_labels_cost_no_launch(ours):
    """Their look-up is fused into what reads it, its gradient into what makes it."""
    labels = replace(step_variants.SMALL, num_classes=10)
    graphs = step_variants.graphs_of("ours", labels, 128)
    assert sum(g.triton for g in graphs) == ours["triton"]
    assert sum(g.triton + g.extern for g in graphs) == ours["calls"]
    assert 0 < sum(g.bytes for g in graphs) - ours["bytes"] < 0.01 * ours["bytes"]


@known
def test_the_small_networks_ratios(committed, ours):
    stock = committed["small"]["stock"]  # counted again by the slow test
    assert stock["bytes"] / ours["bytes"] >= 1.5
    assert stock["triton"] / ours["triton"] >= 2.5


@known
@pytest.mark.slow
def test_stock_counts_as_committed(committed):
    assert step_variants.count_small("stock") == committed["small"]["stock"]


@known
def test_a_cast_of_activations_is_caught(monkeypatch, ours):
    """A block that passes its result through float32 memory, as a careless `.float()` before an opaque op would."""
    forward = ResidualBlock.forward

    def careless(self, *args):
        h = forward(self, *args)
        return torch.ops.aten._adaptive_avg_pool2d(h.float(), h.shape[2:]).to(h.dtype)

    monkeypatch.setattr(ResidualBlock, "forward", careless)
    worse = step_variants.count_small("ours")
    assert worse["bytes"] > 1.05 * ours["bytes"]
    assert worse["calls"] > ours["calls"]


def test_no_bar_has_regressed(committed):
    counts = {v: step_variants.Counts(**c) for v, c in committed["counts"]["0.0"].items()}
    assert set(counts) == set(step_counts.VARIANTS)
    assert set(committed["bars"]) == set(step_counts.WHAT)
    values = step_counts.ratios(counts)
    assert values == pytest.approx(committed["bars"], rel=1e-3)
    # What was reached, less 1% or up to the bar.
    assert values["1"] <= 1.02
    assert {k: v for k, v in values.items() if k != "1" and v < REACHED[k]} == {}


def test_the_committed_table_is_of_the_committed_counts(repo, committed):
    assert (repo / "bench" / "results" / "step_counts.md").read_text() == step_counts.markdown(committed)


def test_a_missed_bar_is_called_missed():
    bytes_, launches = COUNTED["1"], COUNTED["3"]
    assert [bytes_.holds(v) for v in (1.0, 1.5, 1.7)] == ["aim", "met", "missed"]
    assert [launches.holds(v) for v in (8.0, 5.0, 4.9)] == ["aim", "met", "missed"]


def test_an_unknown_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    with pytest.raises(UserError, match=r"torch 9\.9\.0 .* count with torch 2\.15"):
        inductor_mock.check_version()


def test_launches_of_a_foreach_operator():
    copy = torch.ops.aten._foreach_copy_.default
    few, many = [torch.empty(10) for _ in range(64)], [torch.empty(10) for _ in range(65)]
    assert step_variants.launches(copy, (few, few)) == 1
    assert step_variants.launches(copy, (many, many)) == 2
    large = [torch.empty(321 * 65536, device="meta")]
    assert step_variants.launches(copy, (large, large)) == 2
    assert step_variants.launches(torch.ops.aten.view.default, (few[0], [10])) == 0

"""merge_columns beyond its contract, and the linear layer whose backward it is."""

import pytest
import torch
import torch.nn.functional as F

from kernels import linear_qkv, merge_columns


def test_strided_parts_are_taken(device):
    parts = torch.randn(6, 10, 3 * 8, device=device).chunk(3, -1)
    merged, sums = merge_columns(*parts)
    assert torch.equal(merged, torch.cat(parts, -1).flatten(0, 1))
    torch.testing.assert_close(sums, merged.sum(0))


def test_many_rows_are_summed_in_float32(device):
    a, b, c = (torch.full((1000, 16), v, dtype=torch.bfloat16, device=device) for v in (1.0, -3.0, 1 / 256))
    _, sums = merge_columns(a, b, c)
    assert sums.dtype == torch.float32
    assert torch.equal(sums.cpu(), torch.tensor([1000.0, -3000.0, 1000 / 256]).repeat_interleave(16))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"b must be \(4, 8\)", {"b": torch.ones(4, 9)}),
        (TypeError, r"c must be torch.float32", {"c": torch.ones(4, 8).double()}),
        (ValueError, "a must be a matrix", dict.fromkeys("abc", torch.ones(4))),
        (TypeError, "a must be bfloat16", dict.fromkeys("abc", torch.ones(4, 8).long())),
    ],
)
def test_refusals_name_the_argument(error, message, change):
    with pytest.raises(error, match=message):
        merge_columns(**(dict.fromkeys("abc", torch.ones(4, 8)) | change))


def test_q_k_and_v_are_the_linear_layers_chunks_and_so_are_their_gradients(device):
    drawn = [torch.randn(shape, device=device) for shape in ((2, 1, 5, 6), (24, 6), (24,))]
    weights = [torch.randn(2, 1, 5, 8, device=device) for _ in range(3)]
    outcomes = []
    for fn in (linear_qkv, lambda x, weight, bias: F.linear(x, weight, bias).chunk(3, -1)):
        leaves = [v.clone().requires_grad_() for v in drawn]
        parts = fn(*leaves)
        outcomes.append([*parts, *torch.autograd.grad(parts, leaves, weights)])
    for mine, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs)

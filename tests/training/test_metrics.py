import math

import pytest
import torch

from fastdiff.training.metrics import CENTRES, EDGES, NoiseLevels


def test_each_loss_is_counted_in_its_bin():
    levels = NoiseLevels()
    generator = torch.Generator().manual_seed(0)
    log_snr = 8 * torch.randn(3, 500, generator=generator)
    loss = torch.rand(3, 500, generator=generator)
    for part in zip(log_snr, loss, strict=True):
        levels.update(*part)
    row = levels.read()
    for i, centre in enumerate(CENTRES):
        low = -math.inf if i == 0 else EDGES[i]
        high = math.inf if i == len(CENTRES) - 1 else EDGES[i + 1]
        inside = (log_snr >= low) & (log_snr < high)
        assert row["log_snr"][i] == centre
        assert row["images"][i] == inside.sum()
        assert row["loss"][i] == (pytest.approx(loss[inside].double().mean().item()) if inside.any() else None)
    assert sum(row["images"]) == 1500
    assert levels.read()["images"] == [0] * len(CENTRES)
    assert levels.read()["loss"] == [None] * len(CENTRES)


def test_infinite_log_snrs_are_at_the_ends():
    levels = NoiseLevels()
    levels.update(torch.tensor([math.inf, -math.inf, 100.0], dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0]))
    row = levels.read(reset=False)
    assert (row["loss"][0], row["loss"][-1]) == (2, 2)
    assert (row["images"][0], row["images"][-1]) == (1, 2)
    assert levels.read() == row


def test_a_loss_that_is_not_finite_is_left_out():
    levels = NoiseLevels()
    levels.update(torch.tensor([0.5, 0.5, 1.5, 5.5]), torch.tensor([math.nan, 2.0, math.inf, 3.0]))
    row = levels.read()
    losses = {centre: row["loss"][CENTRES.index(centre)] for centre in (0.5, 1.5, 5.5)}
    assert losses == {0.5: 2.0, 1.5: None, 5.5: 3.0}
    assert sum(row["images"]) == 2


def test_the_sums_continue_from_a_saved_state_in_place():
    levels, other = NoiseLevels(), NoiseLevels()
    levels.update(torch.tensor([0.5, 5.5]), torch.tensor([1.0, 3.0]))
    address = other.loss.data_ptr()
    other.load_state_dict(levels.state_dict())
    for part in (levels, other):
        part.update(torch.tensor([0.5]), torch.tensor([0.1]))
    assert other.read() == levels.read()
    assert other.loss.data_ptr() == address


@pytest.mark.gpu
def test_an_update_can_be_captured():
    levels = NoiseLevels("cuda")
    log_snr, loss = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        levels.update(log_snr, loss)
    torch.cuda.current_stream().wait_stream(stream)
    levels.read()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        levels.update(log_snr, loss)
    levels.read()
    for _ in range(3):
        graph.replay()
    assert sum(levels.read()["images"]) == 24

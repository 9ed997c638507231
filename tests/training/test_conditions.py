import numpy as np
import torch

from fastdiff.training.conditions import UNIFORMS, Labels

LABELS = np.arange(1000) % 7


def labels(dropout):
    return Labels(LABELS, num_classes=7, dropout=dropout, device=torch.device("cpu"))


def test_each_image_has_its_own_label_or_none():
    index = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(1000, UNIFORMS, generator=torch.Generator().manual_seed(1))
    told = labels(0.3)(index, uniform)["labels"]
    dropped = uniform[:, 0] < 0.3
    assert told[dropped].eq(7).all()
    assert torch.equal(told[~dropped], index[~dropped] % 7)
    assert 250 < dropped.sum() < 350
    assert torch.equal(labels(0.0)(index, uniform)["labels"], index % 7)

import numpy as np
import torch

from fastdiff.training.conditions import UNIFORMS, CaptionTable, Labels

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


def test_each_image_has_one_of_its_captions_or_the_empty_text():
    captions = tuple(tuple(f"{i} {k}" for k in range(1 + i % 3)) for i in range(600))
    seen = []

    def encode(texts):
        seen.extend(texts)
        return {"text": torch.arange(len(texts))[:, None], "half": torch.arange(len(texts)).half()}

    table = CaptionTable(captions, encode, dropout=0.2, device=torch.device("cpu"))
    assert seen[0] == ""
    assert len(seen) == len(set(seen)) == 1201
    index = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    drawn = set()
    for seed in range(20):
        uniform = torch.rand(600, UNIFORMS, generator=torch.Generator().manual_seed(seed))
        uniform[0, 2] = 1.0 - 2**-24  # the largest that torch.rand draws
        found = table(index, uniform)
        assert found["half"].dtype == torch.float32
        texts = [seen[row] for row in found["text"][:, 0].tolist()]
        assert all(text in ("", *captions[i]) for text, i in zip(texts, index.tolist(), strict=True))
        assert [text == "" for text in texts] == (uniform[:, 1] < 0.2).tolist()
        drawn.update(texts)
    assert len(drawn) > 1190  # of 1201: all captions come

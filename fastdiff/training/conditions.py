"""What the network is told about the images of a batch, looked up by their index in tables on the device.

A part of it is left out at random, so that the network also learns to draw without (Ho & Salimans 2022, algorithm 1).
"""

from collections.abc import Callable
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.captions import Captions
from fastdiff.evaluation.generate import on_device
from fastdiff.runs.texts import Texts

UNIFORMS = 3  # random numbers that each image takes: label left out, caption left out, which of its captions
Table = Callable[[Tensor, Tensor], dict[str, Tensor]]  # (index (N,), uniform (N, UNIFORMS)) -> the network's arguments


class Labels:
    """The classes of a set's images.

    Args:
        labels: integers (M,), in 0..num_classes - 1, of all images of the set.
        num_classes: as a label it means none.
        dropout: probability that a label is left out, in [0, 1).
    """

    def __init__(self, labels: np.ndarray, *, num_classes: int, dropout: float, device: torch.device) -> None:
        self.table = torch.from_numpy(labels).to(device)
        self.num_classes, self.dropout = num_classes, dropout

    def __call__(self, index: Tensor, uniform: Tensor) -> dict[str, Tensor]:
        """labels (N,) for images at `index` (N,) of the set; uniform (N, UNIFORMS) in [0, 1) is drawn in each step."""
        return {"labels": self.table[index].masked_fill(uniform[:, 0] < self.dropout, self.num_classes)}


class CaptionTable:
    """The captions of a set's images, each text once; of several captions of an image one is drawn each time.

    Args:
        captions: of all images of the set, at least one each.
        encode: texts -> tensors, a row for each text.
        dropout: probability that the caption is left out, in [0, 1): the empty text takes its place.
    """

    def __init__(self, captions: Captions, encode: Texts, *, dropout: float, device: torch.device) -> None:
        texts = ["", *sorted(set(chain.from_iterable(captions)) - {""})]
        row = {text: i for i, text in enumerate(texts)}
        counts = np.array([len(each) for each in captions])
        self.rows = torch.tensor([row[text] for text in chain.from_iterable(captions)], device=device)
        self.first = torch.from_numpy(counts.cumsum() - counts).to(device)
        self.count = torch.from_numpy(counts).to(device)
        self.tables = {name: table.to(device) for name, table in encode(texts).items()}
        self.dropout = dropout

    def __call__(self, index: Tensor, uniform: Tensor) -> dict[str, Tensor]:
        """A row of each table for images at `index` (N,) of the set, by uniform (N, UNIFORMS)."""
        count = self.count[index]
        nth = (uniform[:, 2].double() * count).long().clamp(max=count - 1)
        row = self.rows[self.first[index] + nth].masked_fill(uniform[:, 1] < self.dropout, 0)
        return dict(on_device({name: table[row] for name, table in self.tables.items()}, row.device))

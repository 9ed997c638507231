"""What the network is told about the images of a batch, looked up by their index in tables on the device."""

import numpy as np
import torch
from torch import Tensor

UNIFORMS = 1  # random numbers that each image takes


class Labels:
    """The classes of a set's images; some are left out at random (Ho & Salimans 2022, algorithm 1).

    Args:
        labels: integers (M,), in 0..num_classes - 1, of all images of the set.
        num_classes: classes; as a label it means none.
        dropout: probability that a label is left out, in [0, 1).
        device: where batches are.
    """

    def __init__(self, labels: np.ndarray, *, num_classes: int, dropout: float, device: torch.device) -> None:
        self.table = torch.from_numpy(labels).to(device)
        self.num_classes, self.dropout = num_classes, dropout

    def __call__(self, index: Tensor, uniform: Tensor) -> dict[str, Tensor]:
        """The network's arguments for images of the set.

        Args:
            index: (N,) int64.
            uniform: (N, UNIFORMS) random numbers in [0, 1), drawn anew in each step.
        """
        return {"labels": self.table[index].masked_fill(uniform[:, 0] < self.dropout, self.num_classes)}

"""Classes to draw: as users name them, as labels for a network, and whether samples show them."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.datasets import ImageSet
from fastdiff.errors import UsageError
from fastdiff.evaluation.features import FeatureExtractor
from fastdiff.evaluation.graph_loop import Conditions
from fastdiff.reporting.progress import track

SHOWN = 20  # classes that a message lists


def no_class(num_classes: int) -> Conditions:
    """The label that means none; nothing for a network without classes."""
    return {"labels": torch.tensor(num_classes)} if num_classes else {}


def balanced(n: int, num_classes: int) -> Conditions:
    """A label for each of n images, class after class, so that each comes equally often; {} without classes."""
    return {"labels": torch.arange(n) % num_classes} if num_classes else {}


def rows_of(labels: Sequence[int], columns: int) -> Conditions:
    """Labels of a picture with a row for each of `labels`."""
    return {"labels": torch.tensor(labels, dtype=torch.int64).repeat_interleave(columns)}


def parse_classes(words: Sequence[str], names: Sequence[str]) -> list[int]:
    """Labels of the classes that a user names, each once, by name or by number; `all` for all.

    Raises:
        UsageError: there are no classes, or none of that name.
    """
    if words and not names:
        raise UsageError(f"--classes {' '.join(words)}: this network knows no classes; train one with --conditional.")
    known = {str(label): label for label in range(len(names))} | {name: label for label, name in enumerate(names)}
    labels: list[int] = []
    for word in words:
        if word != "all" and word not in known:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise UsageError(
                f"--classes {word} is unknown; choose among {', '.join(names[:SHOWN])}{more}, their numbers from 0, or "
                "all."
            )
        labels += range(len(names)) if word == "all" else [known[word]]
    return list(dict.fromkeys(labels))


@contextmanager
def kept_features(extractor: FeatureExtractor) -> Generator[list[Tensor]]:
    """The features (n, D) of all images that go through the extractor in the block, a batch each."""
    features: list[Tensor] = []
    hook = extractor.register_forward_hook(lambda _module, _images, out: features.append(out))
    try:
        yield features
    finally:
        hook.remove()


class LabelAgreement:
    """The share of images whose nearest real images carry the label that was asked for.

    Args:
        extractor: of the features whose distances count.
        real: images with labels; of more than MOST a part is drawn at random.
        test: other real images of the same classes, for the ceiling; without them each image of `real` is compared with
            the others of `real`.

    Attributes:
        ceiling: the share for real images.
    """

    MOST = 10_000  # images; each sample is compared with all of them
    NEIGHBOURS = 5  # real images that vote for each sample; the least label wins a tie

    def __init__(self, extractor: FeatureExtractor, real: ImageSet, test: ImageSet | None) -> None:
        self.extractor = extractor
        self.real, self.labels = self._features(real)
        if test is not None and test.class_names == real.class_names:
            self.ceiling = self(*self._features(test))
        else:
            self.ceiling = self(self.real, self.labels, itself=True)

    def __call__(self, features: Tensor, asked: Tensor, *, itself: bool = False) -> float:
        """The share for images with these features (n, D), drawn for the labels `asked` (n,).

        Args:
            itself: whether the nearest real image of each is that image.
        """
        asked = asked.to(features.device)
        agreed = []
        for part, labels in zip(features.split(1024), asked.split(1024), strict=True):
            nearest = torch.cdist(part, self.real).topk(self.NEIGHBOURS + itself, largest=False).indices[:, itself:]
            votes = torch.zeros(len(part), int(self.labels.max()) + 1, device=part.device)
            votes.scatter_add_(1, self.labels[nearest], torch.ones_like(nearest, dtype=votes.dtype))
            agreed.append(votes.argmax(1) == labels)
        return torch.cat(agreed).double().mean().item()

    def _features(self, images: ImageSet) -> tuple[Tensor, Tensor]:
        """Features (m, D) and labels (m,) of a set's images, on the extractor's device."""
        assert images.labels is not None
        device = next(self.extractor.parameters()).device
        chosen = images.draw(min(self.MOST, len(images.images)), seed=0)
        features = [
            self.extractor(torch.from_numpy(images.images[part]).to(device).permute(0, 3, 1, 2))
            for part in track(np.array_split(chosen, -(-len(chosen) // 64)), f"features of {images.name} by label")
        ]
        return torch.cat(features), torch.from_numpy(images.labels[chosen]).to(device)

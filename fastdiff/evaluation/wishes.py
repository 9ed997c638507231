"""What samples are to show: as users say it, as a network is told it, and whether they do show it."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff.config import Config
from fastdiff.data.cache import Arrays
from fastdiff.data.datasets import ImageSet
from fastdiff.errors import UsageError
from fastdiff.evaluation.features import FeatureExtractor
from fastdiff.evaluation.frechet import cached_features
from fastdiff.evaluation.graph_loop import Conditions
from fastdiff.reporting.progress import track
from fastdiff.runs.texts import Texts

SHOWN = 20  # classes that a message lists
TEXTS_SHOWN = 8  # captions, a row of a picture each


@dataclass(frozen=True)
class Wishes:
    """What evaluations ask for.

    Attributes:
        of: n -> conditions of n samples, as the data have them.
        rows: conditions of the rows of a picture.
        names: what stands at the left of each row.
    """

    of: Callable[[int], Conditions]
    rows: Conditions
    names: Sequence[str]


def wishes(config: Config, images: ImageSet, read: Texts | None) -> Wishes | None:
    """Each class equally often; or the captions, and classes, of images drawn at random. None: nothing to ask for."""
    if read is None:
        names = config.conditions.class_names
        labels = {"labels": torch.arange(len(names))}
        return Wishes(partial(balanced, num_classes=len(names)), labels, names) if names else None
    captions = images.captions or ()

    def of(chosen: np.ndarray) -> tuple[Conditions, list[str]]:
        texts = [captions[i][k % len(captions[i])] for k, i in enumerate(chosen)]
        if config.net.num_classes == 0 or images.labels is None:
            return read(texts), texts
        return {**read(texts), "labels": torch.from_numpy(images.labels[chosen])}, texts

    order = images.draw(len(images.images), seed=0)
    rows, names = of(order[:TEXTS_SHOWN])
    return Wishes(lambda n: of(np.resize(order, n))[0], rows, names)


def nothing(config: Config, read: Texts | None) -> Conditions:
    """What each condition is where nothing is asked for: the label that means none, the empty text."""
    told = {"labels": torch.tensor(config.net.num_classes)} if config.net.num_classes else {}
    if read is not None:
        told |= {name: rows[0] for name, rows in read([""]).items()}
    return told


def balanced(n: int, num_classes: int) -> Conditions:
    """A label for each of n images, class after class, so that each comes equally often."""
    return {"labels": torch.arange(n) % num_classes}


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
        cache: folder of features computed before, by the images' content and what computes them.

    Attributes:
        ceiling: the share for real images.
    """

    MOST = 10_000  # images; each sample is compared with all of them
    NEIGHBOURS = 5  # real images that vote for each sample; the least label wins a tie

    def __init__(
        self, extractor: FeatureExtractor, real: ImageSet, test: ImageSet | None, cache: Path | None = None
    ) -> None:
        self.extractor, self.cache = extractor, cache
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
            k = min(self.NEIGHBOURS + itself, len(self.real))
            nearest = torch.cdist(part, self.real).topk(k, largest=False).indices[:, itself:]
            votes = torch.zeros(len(part), int(self.labels.max()) + 1, device=part.device)
            votes.scatter_add_(1, self.labels[nearest], torch.ones_like(nearest, dtype=votes.dtype))
            agreed.append(votes.argmax(1) == labels)
        return torch.cat(agreed).double().mean().item()

    def _features(self, images: ImageSet) -> tuple[Tensor, Tensor]:
        """Features (m, D) and labels (m,) of a set's images, on the extractor's device."""
        assert images.labels is not None
        device = next(self.extractor.parameters()).device
        chosen = images.draw(min(self.MOST, len(images.images)), seed=0)

        def build() -> Arrays:
            parts = track(np.array_split(chosen, -(-len(chosen) // 64)), f"features of {images.name} by label")
            batches = (torch.from_numpy(images.images[part]).to(device).permute(0, 3, 1, 2) for part in parts)
            return {"features": torch.cat([self.extractor(batch) for batch in batches]).cpu().numpy()}

        features = cached_features("features", self.extractor, images, self.cache, build)["features"]
        return torch.from_numpy(features).to(device), torch.from_numpy(images.labels[chosen]).to(device)

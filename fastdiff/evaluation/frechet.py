"""The Frechet distance between generated and real images, in the feature space of a fixed network.

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

for features taken as Gaussian with means m and covariances C. Few samples bias it upwards: compare only values with the
same number of samples, extractor, input size and reference set.

Source: Heusel et al. 2017, https://arxiv.org/abs/1706.08500, equation 6.
"""

import hashlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from fastdiff._kernels import source_hash
from fastdiff.data.cache import Arrays, cached_arrays
from fastdiff.data.datasets import ImageSet
from fastdiff.errors import UserError
from fastdiff.evaluation.features import FeatureExtractor
from fastdiff.reporting.progress import track

Sums = tuple[Tensor, Tensor, Tensor]


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians.

    With C = R^T R, the trace of (C1 C2)^(1/2) is the sum of the singular values of R1 R2^T. Unlike the eigenvalues of
    C1 C2 (torchmetrics) or its square root (scipy), they are real, and accurate for singular covariances too, that is
    for fewer samples than features; there the others come out too small by about 1e-6, so below 0 for equal sets.

    Args:
        mean1, mean2: float64 (D,).
        cov1, cov2: float64 (D, D), symmetric and positive semi-definite, of any rank.
    """
    mean1, cov1, mean2, cov2 = (each.double().cpu() for each in (mean1, cov1, mean2, cov2))
    cross = torch.linalg.svdvals(_root(cov1) @ _root(cov2).T).sum()
    squared = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(squared.item(), 0.0)


def _root(cov: Tensor) -> Tensor:
    """R (rank, D) with R^T R = cov; directions whose variance is rounding error are left out."""
    try:
        variances, directions = torch.linalg.eigh(cov)
    except torch.linalg.LinAlgError:  # LAPACK's divide and conquer can fail on many equal eigenvalues
        directions, variances, _ = torch.linalg.svd(cov)  # of a positive semi-definite matrix: the same, descending
        variances, directions = variances.flip(0), directions.flip(1)
    kept = variances > variances[-1].clamp(min=0) * len(variances) * torch.finfo(variances.dtype).eps
    return variances[kept].sqrt()[:, None] * directions[:, kept].T


class FrechetDistance:
    """Frechet distance of samples to an image set, on torchmetrics' FrechetInceptionDistance.

    torchmetrics extracts the features and keeps their sums in float64; the distance is `frechet_distance` of them. The
    reference's sums are computed once, with a progress bar, and cached by the set's content, extractor and input size,
    and by the version of what computes them.

    Args:
        extractor: from `make_extractor`.
        image_set: the reference; all its images count.
        cache_dir: folder of the cached reference statistics (13 or 34 MB each), see `cached_features`.
        device: where features are extracted; the extractor moves there.
        reference: whether to have the reference's sums; ranks that only add up samples for another one need none.

    Attributes:
        metric: "fid" or "fd_efficientnet_lite0".
        reference: the name of the reference set.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        image_set: ImageSet,
        *,
        cache_dir: Path | str | None,
        device: torch.device | str,
        reference: bool = True,
    ):
        from torchmetrics.image.fid import FrechetInceptionDistance  # here, because this import takes seconds

        self.device = torch.device(device)
        self.extractor = extractor
        self.metric = extractor.metric
        self.reference = image_set.name
        self.batch_size = 32 if self.device.type == "cpu" else 128  # on a CPU larger ones are no faster
        # Its sums are float64 as it is; `set_dtype(float64)` would only run the network itself in float64.
        statistics = FrechetInceptionDistance(extractor, reset_real_features=False, normalize=False)
        self._statistics = statistics.to(self.device)
        if reference:
            sums = cached_features("frechet", extractor, image_set, cache_dir, lambda: self._reference_sums(image_set))
            for name, value in sums.items():
                setattr(self._statistics, f"real_features_{name}", torch.from_numpy(value).to(self.device))

    def update(self, images: Tensor) -> None:
        """Add samples.

        Args:
            images: uint8 (N, 3, H, W) in 0..255, on any device; `to_uint8` makes them from network outputs.
        """
        for batch in images.split(self.batch_size):
            self._statistics.update(batch.to(self.device), real=False)

    def compute(self) -> float:
        """The distance of all samples since the last `reset` to the reference; on the CPU, in about a second.

        Raises:
            UserError: fewer than 2 samples.
        """
        if self.count < 2:
            raise UserError(f"{self.metric} needs at least 2 samples, got {self.count}: draw more")
        s = self._statistics
        reference = (s.real_features_sum, s.real_features_cov_sum, s.real_features_num_samples)
        return frechet_distance(*_mean_and_cov(reference), *_mean_and_cov(self.sums))

    def reset(self) -> None:
        """Forget the samples; the reference stays."""
        self._statistics.reset()

    @property
    def sums(self) -> Sums:
        """Of the samples' features: sum float64 (D,), sum of outer products float64 (D, D), and number int64 ().

        These are the accumulators themselves: adding other ranks' in place merges their samples.
        """
        s = self._statistics
        return s.fake_features_sum, s.fake_features_cov_sum, s.fake_features_num_samples

    @property
    def count(self) -> int:
        """Samples since the last `reset`; waits for the device."""
        return int(self.sums[2])

    def _reference_sums(self, image_set: ImageSet) -> Arrays:
        s = self._statistics
        starts = range(0, len(image_set.images), self.batch_size)
        for start in track(starts, f"{self.extractor.name} features of {self.reference}"):
            images = image_set.images[start : start + self.batch_size]
            batch = torch.tensor(images, device=self.device)  # a copy, as the array may be read-only
            s.update(batch.permute(0, 3, 1, 2), real=True)
        names = ("sum", "cov_sum", "num_samples")
        return {name: getattr(s, f"real_features_{name}").cpu().numpy() for name in names}


def cached_features(
    kind: str, extractor: FeatureExtractor, images: ImageSet, folder: Path | str | None, build: Callable[[], Arrays]
) -> Arrays:
    """What `build` makes of a set's features, stored by the set's content and by the version of what computes them.

    Args:
        kind: of what is made of them; begins the file's name.
        folder: made if need be; None: nothing is stored.
    """
    if folder is None:
        return build()
    name = f"{kind}-{extractor.name}-{extractor.size}px-{images.sha256[:16]}"
    key = hashlib.sha256(f"{images.sha256}, {extractor_version(extractor)}".encode()).hexdigest()[:16]
    return cached_arrays(Path(folder) / f"{name}-{key}.npz", build, outdated=f"{name}-*.npz")


def extractor_version(extractor: FeatureExtractor) -> str:
    """What computes the statistics: our sources, PyTorch, and the packages of network and weights."""
    sources = source_hash(Path(__file__).parent, ["features.py", "frechet.py"])
    return ", ".join([sources, *(f"{package} {_installed(package)}" for package in ("torch", *extractor.packages))])


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # importable all the same, from a path
        return "of unknown version"


def _mean_and_cov(sums: Sums) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D), float64."""
    total, outer, n = sums
    mean = total / n
    return mean, (outer - n * torch.outer(mean, mean)) / (n - 1)

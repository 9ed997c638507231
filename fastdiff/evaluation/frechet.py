"""The Frechet distance between generated and real images, in the feature space of a fixed network.

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

for features taken as Gaussian with means m and covariances C. Few samples bias it upwards: compare only values with the
same number of samples, extractor, input size and reference set.

Source: Heusel et al. 2017, https://arxiv.org/abs/1706.08500, equation 6.
"""

import hashlib
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastdiff._kernels import source_hash
from fastdiff.data.datasets import ImageSet
from fastdiff.errors import UserError
from fastdiff.evaluation.features import FeatureExtractor
from fastdiff.reporting.progress import track
from fastdiff.runs.files import write_atomically

log = logging.getLogger(__name__)

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
        cache_dir: folder of the cached reference statistics (13 or 34 MB each); made if need be. None: no cache.
        device: where features are extracted; the extractor moves there.
        batch_size: images extracted at a time; by default 128, and 32 on a CPU, where larger ones are no faster.
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
        batch_size: int | None = None,
        reference: bool = True,
    ):
        from torchmetrics.image.fid import FrechetInceptionDistance  # here, because this import takes seconds

        self.device = torch.device(device)
        self.extractor = extractor
        self.metric = extractor.metric
        self.reference = image_set.name
        self.batch_size = batch_size or (32 if self.device.type == "cpu" else 128)
        # Its sums are float64 as it is; `set_dtype(float64)` would only run the network itself in float64.
        self._statistics = FrechetInceptionDistance(extractor, reset_real_features=False, normalize=False).to(
            self.device
        )
        if reference:
            self._load_reference(image_set, None if cache_dir is None else Path(cache_dir))

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

    def _load_reference(self, image_set: ImageSet, cache_dir: Path | None) -> None:
        """Take the reference's sums from the cache, or compute and store them."""
        extractor = self.extractor
        name = f"frechet-{extractor.name}-{extractor.size}px-{image_set.sha256[:16]}.safetensors"
        path = None if cache_dir is None else cache_dir / name
        key = {
            "version": extractor_version(extractor),
            "extractor": extractor.name,
            "size": str(extractor.size),
            "sha256": image_set.sha256,
        }
        s = self._statistics
        sums = None if path is None else _read_sums(path, key)
        if sums is not None:
            s.real_features_sum, s.real_features_cov_sum, s.real_features_num_samples = (
                x.to(self.device) for x in sums
            )
            return
        starts = range(0, len(image_set.images), self.batch_size)
        for start in track(starts, f"{extractor.name} features of {self.reference}"):
            images = image_set.images[start : start + self.batch_size]
            batch = torch.tensor(images, device=self.device)  # a copy, as the array may be read-only
            s.update(batch.permute(0, 3, 1, 2), real=True)
        if path is not None:
            _write_sums(path, key, (s.real_features_sum, s.real_features_cov_sum, s.real_features_num_samples))


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


def _checksum(sums: Sums) -> str:
    digest = hashlib.sha256()
    for each in sums:
        digest.update(each.numpy().tobytes())
    return digest.hexdigest()


def _read_sums(path: Path, key: dict[str, str]) -> Sums | None:
    """The sums stored at `path`; None if there are none for this key, or damaged ones."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            sums = (file.get_tensor("sum"), file.get_tensor("cov_sum"), file.get_tensor("num_samples"))
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        log.warning("%s is damaged or cannot be read (%s); the reference statistics are computed again", path, error)
        return None
    checksum = stored.pop("checksum", None)
    if stored != key:
        return None
    if checksum != _checksum(sums):  # safetensors itself does not notice a flipped bit
        log.warning("%s is damaged (its checksum differs); the reference statistics are computed again", path)
        return None
    return sums


def _write_sums(path: Path, key: dict[str, str], sums: Sums) -> None:
    """Store the sums; a cache that cannot be written costs only time, so it is a warning."""
    total, outer, n = (each.cpu() for each in sums)
    tensors = {"sum": total, "cov_sum": outer, "num_samples": n}
    try:
        write_atomically(path, save(tensors, metadata=key | {"checksum": _checksum((total, outer, n))}))
    except (OSError, SafetensorError) as error:
        log.warning("the reference statistics cannot be cached at %s (%s)", path, error)

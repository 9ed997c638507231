import logging
import os
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from fastdiff.data.datasets import ImageSet
from fastdiff.data.pixels import to_uint8
from fastdiff.errors import UserError
from fastdiff.evaluation import frechet
from fastdiff.evaluation.features import EfficientNetLite0, FeatureExtractor
from fastdiff.evaluation.frechet import FrechetDistance, frechet_distance


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small networks on a busy machine: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class RandomProjection(FeatureExtractor):
    """A fixed linear map of the pixels, so that features can be computed by hand; counts the images it sees."""

    metric = "fd_fake"

    def __init__(self, num_features: int = 6, name: str = "fake", size: int = 4):
        super().__init__()
        self.name, self.size, self.num_features = name, size, num_features
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(3 * 4 * 4, num_features, generator=generator, dtype=torch.float64) / 48**0.5
        self.seen = 0

    def extract(self, images):
        self.seen += len(images)
        return (images.double().flatten(1) / 255 @ self.matrix).float()  # equal for any batch size


def image_set(n: int = 40, seed: int = 0) -> ImageSet:
    images = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    images.flags.writeable = False  # as those that are mapped from a file
    return ImageSet.from_arrays(images, None, f"noise-{seed}")


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images).permute(0, 3, 1, 2)


def samples(n: int = 30, seed: int = 1) -> torch.Tensor:
    return nchw(image_set(n, seed).images // 2 + 40)


def gaussian(d: int, n: int, seed: int) -> torch.Tensor:
    """n draws of a d-dimensional Gaussian with correlations; float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + torch.rand(d, generator=generator)


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.mean(0), torch.cov(x.T)


def exact_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """From the features themselves: the cross term is the nuclear norm of the product of the centred matrices."""
    a, b = (x - x.mean(0)) / (len(x) - 1) ** 0.5, (y - y.mean(0)) / (len(y) - 1) ** 0.5
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross).item()


# --- rounding to uint8


def test_every_level_survives_the_way_to_minus_one_one_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert torch.equal(to_uint8(levels.double() / 127.5 - 1), levels)


def test_it_rounds_and_clamps():
    levels = torch.tensor([0.4, 0.6, 99.4, 99.6, 254.4, 254.6, -30.0, 300.0])
    expected = torch.tensor([0, 1, 99, 100, 254, 255, 0, 255], dtype=torch.uint8)  # truncation gives 0, 99, 254 for *.6
    assert torch.equal(to_uint8(levels / 127.5 - 1), expected)


def test_layouts_and_half_precision():
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    nhwc = x.permute(0, 2, 3, 1)
    assert torch.equal(to_uint8(nhwc), to_uint8(x).permute(0, 2, 3, 1))
    assert to_uint8(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    half = x.to(torch.bfloat16)
    assert torch.equal(to_uint8(half), to_uint8(half.float()))  # the arithmetic is not bfloat16's 8 bits
    with pytest.raises(TypeError, match="uint8"):
        to_uint8(torch.zeros(2, dtype=torch.uint8))


# --- the distance between Gaussians


def test_in_one_dimension_it_is_the_distance_of_means_and_deviations():
    mean1, mean2 = torch.tensor([1.0]), torch.tensor([4.0])
    cov1, cov2 = torch.tensor([[4.0]]), torch.tensor([[25.0]])
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx((4 - 1) ** 2 + (5 - 2) ** 2, rel=1e-14)


def test_closed_form_for_covariances_that_commute():
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    var1, var2 = torch.rand(2, 8, generator=generator, dtype=torch.float64)
    shift = torch.rand(8, generator=generator, dtype=torch.float64)
    expected = shift.square().sum() + (var1.sqrt() - var2.sqrt()).square().sum()
    found = frechet_distance(shift, axes * var1 @ axes.T, torch.zeros(8), axes * var2 @ axes.T)
    assert found == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.lab
def test_against_scipy_and_torchmetrics_where_covariances_are_regular():
    from torchmetrics.image.fid import _compute_fid

    (mean1, cov1), (mean2, cov2) = moments(gaussian(20, 200, 0)), moments(gaussian(20, 150, 1))
    root = scipy.linalg.sqrtm((cov1 @ cov2).numpy()).real
    expected = ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()).item() - 2 * np.trace(root)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(
        _compute_fid(mean1, cov1, mean2, cov2).item(), rel=1e-10
    )


@pytest.mark.parametrize(("n1", "n2"), [(300, 10), (10, 12), (300, 2), (2, 2)])
def test_singular_covariances(n1, n2):
    """Fewer samples than features, as in every small evaluation."""
    x, y = gaussian(50, n1, 0), gaussian(50, n2, 1)
    assert frechet_distance(*moments(x), *moments(y)) == pytest.approx(exact_distance(x, y), rel=1e-10)


def test_the_distance_survives_an_eigensolver_that_does_not_converge(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    few = [torch.randn(8, 40, generator=rng, dtype=torch.float64) for _ in range(2)]
    sums = [each for x in few for each in (x.mean(0), torch.cov(x.T))]
    expected = frechet_distance(*sums)

    def fails(_):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert frechet_distance(*sums) == pytest.approx(expected, rel=1e-9)


def test_equal_and_constant_sets():
    few = gaussian(50, 10, 0)
    constant = few[:1].repeat(10, 1)
    scale = torch.cov(few.T).trace().item()
    assert 0 <= frechet_distance(*moments(few), *moments(few)) < 1e-12 * scale
    assert frechet_distance(*moments(constant), *moments(constant)) < 1e-12 * scale
    expected = (few.mean(0) - constant[0]).square().sum().item() + scale  # all that is left of the trace term
    assert frechet_distance(*moments(few), *moments(constant)) == pytest.approx(expected, rel=1e-12)


# --- the metric


def test_it_is_the_distance_of_the_features(tmp_path):
    real, fake, extractor = image_set(), samples(), RandomProjection()
    distance = FrechetDistance(extractor, real, cache_dir=tmp_path, device="cpu")
    distance.batch_size = 7
    distance.update(fake[:11])
    distance.update(fake[11:])
    expected = exact_distance(extractor(nchw(real.images)).double(), extractor(fake).double())
    assert expected > 0.1
    assert distance.compute() == pytest.approx(expected, rel=1e-9)
    assert distance.compute() == pytest.approx(distance._statistics.compute().item(), rel=1e-5)  # torchmetrics' own
    assert (distance.metric, distance.reference, distance.count) == ("fd_fake", "noise-0", 30)


def test_the_reference_itself_is_at_distance_zero(tmp_path):
    real = image_set()
    distance = FrechetDistance(RandomProjection(), real, cache_dir=tmp_path, device="cpu")
    distance.update(nchw(real.images))
    assert distance.compute() < 1e-12


def test_reset_forgets_samples_and_keeps_the_reference(tmp_path):
    distance = FrechetDistance(RandomProjection(), image_set(), cache_dir=tmp_path, device="cpu")
    distance.update(samples())
    first = distance.compute()
    distance.update(samples(seed=5))
    assert distance.compute() != first
    distance.reset()
    assert distance.count == 0
    distance.update(samples())
    assert distance.compute() == first


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_samples(tmp_path, n):
    distance = FrechetDistance(RandomProjection(), image_set(), cache_dir=tmp_path, device="cpu")
    if n:
        distance.update(samples(n=2)[:n])
    with pytest.raises(UserError, match=f"fd_fake needs at least 2 samples, got {n}"):
        distance.compute()


def test_sums_of_two_ranks_merge(tmp_path):
    whole, left, right = (
        FrechetDistance(RandomProjection(), image_set(), cache_dir=tmp_path, device="cpu") for _ in range(3)
    )
    whole.update(samples())
    left.update(samples()[:13])
    right.update(samples()[13:])
    assert [each.dtype for each in left.sums] == [torch.float64, torch.float64, torch.int64]
    for mine, other in zip(left.sums, right.sums, strict=True):
        mine += other
    assert left.count == 30
    assert left.compute() == pytest.approx(whole.compute(), rel=1e-9)


# --- the cache of reference statistics


def build(cache_dir, real=None, **extractor):
    """A new distance, the number of reference images it extracted, and its value for fixed samples."""
    fake = RandomProjection(**extractor)
    distance = FrechetDistance(fake, real or image_set(), cache_dir=cache_dir, device="cpu")
    seen = fake.seen
    distance.update(samples())
    return seen, distance.compute()


def test_the_reference_is_extracted_once(tmp_path):
    seen, value = build(tmp_path / "new" / "folder")
    assert seen == 40
    assert build(tmp_path / "new" / "folder") == (0, value)
    (file,) = (tmp_path / "new" / "folder").iterdir()  # no temporary name left
    assert file.suffix == ".npz"


@pytest.mark.parametrize("change", ["content", "extractor", "size", "sources", "package"])
def test_other_content_extractor_size_or_version_is_another_entry(tmp_path, monkeypatch, change):
    build(tmp_path)
    real, options = image_set(), {}
    if change == "content":
        real = image_set(seed=9)
    elif change == "sources":
        monkeypatch.setattr(frechet, "source_hash", lambda *arguments: "0" * 64)
    elif change == "package":
        monkeypatch.setattr(frechet, "version", lambda package: "99")
    else:
        options = {"extractor": {"name": "other"}, "size": {"size": 5}}[change]
    assert build(tmp_path, real, **options)[0] == 40
    assert build(tmp_path, real, **options)[0] == 0
    monkeypatch.undo()
    assert build(tmp_path)[0] == 0  # the first entry is still there


def test_the_name_of_the_set_does_not_matter(tmp_path):
    build(tmp_path)
    assert build(tmp_path, replace(image_set(), name="the same images elsewhere"))[0] == 0


def test_the_key_is_checked_not_only_the_file_name(tmp_path):
    real = image_set()
    build(tmp_path, real)
    alike = replace(image_set(seed=9), sha256=real.sha256[:20] + "0" * 44)
    assert build(tmp_path, alike)[0] == 40


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "flipped", "lacking"])
def test_a_damaged_cache_is_computed_again(tmp_path, caplog, damage):
    _, value = build(tmp_path)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[data.index(b"cov_sum.npy") + 300] ^= 1  # one bit of one number
    if damage == "lacking":
        data = data.replace(b"cov_sum.npy", b"cov_som.npy")
    file.write_bytes({"empty": b"", "garbage": b"\xff" * 999, "truncated": data[:-9]}.get(damage, data))
    with caplog.at_level(logging.WARNING):
        assert build(tmp_path) == (40, value)
    assert len(caplog.records) == 1
    assert f"{file} is damaged" in caplog.text
    assert build(tmp_path) == (0, value)


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog, monkeypatch):
    def full(_):
        raise OSError("No space left on device")

    (tmp_path / "file").write_text("where a folder should be")
    assert build(tmp_path / "file")[0] == 40
    monkeypatch.setattr(os, "fsync", full)
    assert build(tmp_path / "disk")[0] == 40
    assert ["cannot be written" in record.getMessage() for record in caplog.records] == [True] * 2
    assert list((tmp_path / "disk").iterdir()) == []


# --- real features


@pytest.mark.lab
def test_worse_images_are_farther_away(tmp_path):
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:600, None] / 8 - 1
    digits = F.interpolate(digits, size=(32, 32), mode="bicubic", antialias=True).repeat(1, 3, 1, 1)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    real, other = digits[order[:300]], digits[order[300:]]
    reference = ImageSet.from_arrays(to_uint8(real).permute(0, 2, 3, 1).contiguous().numpy(), None, "digits-half")
    distance = FrechetDistance(EfficientNetLite0(64), reference, cache_dir=tmp_path, device="cpu")

    def measure(images: torch.Tensor) -> float:
        distance.reset()
        distance.update(to_uint8(images))
        return distance.compute()

    halves = measure(other)
    blurred = measure(F.avg_pool2d(F.pad(other, (1, 1, 1, 1), mode="replicate"), 3, stride=1))
    noisy = measure(other + 0.1 * torch.randn(other.shape, generator=torch.Generator().manual_seed(1)))
    assert distance.metric == "fd_efficientnet_lite0"
    assert 0 < 1.1 * halves < blurred < noisy

"""Feature extraction, and an evaluation beside the training between two of them."""

import tempfile

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.parts import constant_batch, our_step, sampling, training_work
from bench.suite import Against, Comparison, Size, image_set, network_flops
from bench.timing import Workload
from fastdiff.errors import UserError
from fastdiff.evaluation.features import EfficientNetLite0, FeatureExtractor
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.evaluation.generate import SamplerSettings

pytestmark = pytest.mark.timeout(900)


class Trial(FeatureExtractor):
    """Stands in for the network in a trial, in which only the code around it is to run."""

    name, metric, size, num_features = "trial", "fd_trial", 8, 12

    def extract(self, images: Tensor) -> Tensor:
        return images[:, :, ::4, ::4].float().flatten(1)


def _extractor(size: Size) -> FeatureExtractor:
    if size.trial:
        return Trial()
    try:
        return EfficientNetLite0(224 if size.device.type == "cuda" else 64).to(size.device)  # as make_extractor chooses
    except UserError as missing:
        pytest.skip(str(missing))


def _features(size: Size) -> Comparison:
    def build() -> dict[str, Workload]:
        extractor = _extractor(size)
        n = 4 if size.trial else 128 if size.device.type == "cuda" else 32  # as FrechetDistance chooses
        side = size.config.net.image_size
        images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, device=size.device)
        with FlopCounterMode(display=False) as counter:
            extractor(images)
        run = Workload(lambda i: extractor(images), flops=counter.get_total_flops(), images=n)
        return {"efficientnet_lite0": run}

    return Comparison("evaluation", "features", ("efficientnet_lite0",), build, {})


def _evaluation(size: Size) -> Comparison:
    """Some samples and their features, counted up to the config's number of samples; and the distance, once."""
    c = size.config
    training, samples, distance = (
        f"{c.eval.eval_every} training steps",
        f"{c.eval.eval_samples} samples",
        "Frechet distance",
    )

    def build() -> dict[str, Workload]:
        n = min(c.eval.eval_samples, c.eval.eval_batch_size if size.device.type == "cuda" else 16)
        with tempfile.TemporaryDirectory() as folder:
            reference = image_set(512 if size.device.type == "cuda" else 64, c.net.image_size)
            extractor = _extractor(size)
            sampled, full = (
                FrechetDistance(extractor, reference, cache_dir=folder, device=size.device) for _ in range(2)
            )
        full.update(torch.from_numpy(reference.images).permute(0, 3, 1, 2))
        draw = sampling(size, SamplerSettings(c.eval.eval_sampler, c.eval.eval_steps), n, captured=size.ours)
        batch, step = constant_batch(size), our_step(size)
        forward, _ = network_flops(c.net)
        return {
            training: training_work(size, lambda i: step(batch, i), units=1 / c.eval.eval_every),
            samples: Workload(
                lambda i: sampled.update(draw(i)),
                flops=forward * n * c.eval.eval_steps,
                images=n,
                units=n / c.eval.eval_samples,
            ),
            distance: Workload(lambda i: full.compute()),
        }

    ratios = {samples: (Against(training, "lower", "16", plus=distance),)}
    return Comparison("evaluation", "beside training", (training, samples, distance), build, ratios)


def comparisons(size: Size) -> list[Comparison]:
    return [_features(size), _evaluation(size)]


def test_evaluation(record):
    record()

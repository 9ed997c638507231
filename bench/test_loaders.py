"""How much faster a loader is than the training that it feeds."""

import pytest

from bench.parts import constant_batch, loader, our_step, training_work
from bench.suite import Against, Comparison, Size
from bench.timing import Workload
from fastdiff.data.loaders import LOADERS

pytestmark = pytest.mark.timeout(900)  # the network is compiled

TRAINING = "training step"


def _comparison(size: Size, kind: str) -> Comparison:
    def build() -> dict[str, Workload]:
        batches, batch, step = loader(size, kind), constant_batch(size), our_step(size)
        return {
            TRAINING: training_work(size, lambda i: step(batch, i)),
            # Each byte is read and written at least once.
            kind: Workload(lambda i: next(batches), bytes=2 * batch.nbytes, images=len(batch)),
        }

    ratios = {kind: (Against(TRAINING, "higher", "7"),)}
    return Comparison("loaders", f"batch {size.config.optim.batch_size}, {kind}", (TRAINING, kind), build, ratios)


def comparisons(size: Size) -> list[Comparison]:
    return [_comparison(size, kind) for kind in LOADERS]


def test_loaders(record):
    record()

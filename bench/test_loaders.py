"""How much faster a loader is than the training that it feeds."""

import pytest

from bench.parts import constant_batch, loader, our_step, training_work
from bench.suite import Against, Comparison, Size
from bench.timing import Workload

pytestmark = pytest.mark.timeout(900)  # the network is compiled

TRAINING = "training step"


def comparisons(size: Size) -> list[Comparison]:
    kinds = ("dali", "resident")

    def build() -> dict[str, Workload]:
        batch, step = constant_batch(size), our_step(size)
        work = {TRAINING: training_work(size, lambda i: step(batch, i))}
        for kind in kinds:
            batches = loader(size, kind)
            # Each byte is read and written at least once.
            work[kind] = Workload(lambda i, b=batches: next(b), bytes=2 * batch.nbytes, images=len(batch))
        return work

    ratios = {kind: (Against(TRAINING, "higher", "7"),) for kind in kinds}
    return [Comparison("loaders", f"batch {size.config.optim.batch_size}", (TRAINING, *kinds), build, ratios)]


def test_loaders(record):
    record()

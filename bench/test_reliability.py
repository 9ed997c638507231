"""What it costs that nothing is lost: the guard against numbers that are not finite, and checkpoints."""

import tempfile

import pytest
import torch

from bench.parts import constant_batch, make_parts, our_step, training_work
from bench.suite import Against, Comparison, Size
from bench.timing import Workload
from fastdiff.runs import checkpoint
from fastdiff.runs.async_save import snapshot
from fastdiff.training.metrics import Metrics

pytestmark = pytest.mark.timeout(900)

STEP, GUARD = "training step", "finite guard"
SNAPSHOT, WRITE = "snapshot, while training waits", "hash and write, in the background"


def _guard(size: Size) -> Comparison:
    """The sums of a step, which leave out and count what is not finite, run eagerly: a captured step launches less.

    The update's own look, two operations on the gradient's norm, is not in it.
    """

    def build() -> dict[str, Workload]:
        batch, step = constant_batch(size), our_step(size)
        metrics = Metrics(size.device)
        loss, norm = (torch.ones((), device=size.device) for _ in range(2))
        number = torch.zeros((), dtype=torch.int64, device=size.device)
        return {
            STEP: training_work(size, lambda i: step(batch, i)),
            GUARD: Workload(lambda i: metrics.add(loss, norm, number, allowed=0)),
        }

    return Comparison("reliability", GUARD, (STEP, GUARD), build, {GUARD: (Against(STEP, "lower", "guard"),)})


def _checkpoint(size: Size) -> Comparison:
    """Weights, average and moments of the size's network; the write ends with the disk's word that it has them."""

    def build() -> dict[str, Workload]:
        model, update = make_parts(size, "triton" if size.ours else "torch")
        update.begin(lr=0.0)
        update.add([torch.zeros_like(w) for w in update.weights.values()])
        update.apply(grad_clip=1.0)  # makes the moments
        state = {"model": model.state_dict(), "ema": update.ema.state_dict(), "optimizer": update.state_dict()}
        folder = tempfile.TemporaryDirectory()
        host = snapshot(state)
        moved = 2 * sum(t.nbytes for t in checkpoint.tensors(state))
        return {
            SNAPSHOT: Workload(lambda i: snapshot(state), bytes=moved),
            WRITE: Workload(lambda i, folder=folder: checkpoint.save(folder.name, 1, host), bytes=moved),
        }

    return Comparison("reliability", "checkpoint", (SNAPSHOT, WRITE), build, {SNAPSHOT: (Against(WRITE, "lower"),)})


def comparisons(size: Size) -> list[Comparison]:
    return [_guard(size), _checkpoint(size)]


def test_reliability(record):
    record()

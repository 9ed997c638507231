"""The training step: from the plain baseline to ours, one change after the other; ours with each loader; and beside
ours each lever."""

import os

import pytest

from bench.levers import Lever, lever_step, levers
from bench.parts import constant_batch, loader, our_step, train_step, training_work
from bench.plain import endless, plain_step
from bench.suite import FLOOR, Against, Comparison, Size, image_set
from bench.timing import Workload
from fastdiff.data.loaders import LOADERS

pytestmark = pytest.mark.timeout(900)  # the network is compiled twice

PLAIN = "eager fp32 + DataLoader"
OURS = "as it is"


def _ladder(size: Size) -> Comparison:
    memory = "+ bf16 + channels_last" if size.bf16 else "+ channels_last"
    variants = (PLAIN, memory, "+ compile")
    ratios = {
        PLAIN: (Against(FLOOR, "lower"),),
        memory: (Against(PLAIN, "higher"), Against(FLOOR, "lower")),
        "+ compile": (Against(memory, "higher"), Against(PLAIN, "higher"), Against(FLOOR, "lower")),
    }
    if size.ours:
        variants += ("+ our kernels", "+ graph")
        ratios["+ our kernels"] = (Against("+ compile", "higher"), Against(FLOOR, "lower"))
        ratios["+ graph"] = (
            Against("+ our kernels", "higher"),
            Against("+ compile", "higher", "12"),
            Against(PLAIN, "higher", "13"),
            Against(FLOOR, "lower", "11"),
        )

    def build() -> dict[str, Workload]:
        c = size.config
        images = image_set(size.images, c.net.image_size).images
        cuda = size.device.type == "cuda"
        workers = min(8, (os.cpu_count() or 1) - 1) if cuda else 0  # on a CPU they would take the step's own cores
        batches = endless(images, c.optim.batch_size, workers=workers, pin_memory=cuda)
        steps = {
            memory: train_step(size, kernels="torch", compile=False),
            "+ compile": train_step(size, kernels="torch", compile=True),
        }
        if size.ours:
            steps["+ our kernels"] = train_step(size, kernels="triton", compile=True)
            steps["+ graph"] = our_step(size)
        batch = constant_batch(size)
        work = {PLAIN: training_work(size, plain_step(c, batches, size.device))}
        return work | {name: training_work(size, lambda i, step=step: step(batch, i)) for name, step in steps.items()}

    return Comparison("step", f"batch {size.config.optim.batch_size}", variants, build, ratios)


def _with_loader(size: Size, kind: str) -> Comparison:
    def build() -> dict[str, Workload]:
        batches, batch, step = loader(size, kind), constant_batch(size), our_step(size)
        return {
            "constant batch": training_work(size, lambda i: step(batch, i)),
            kind: training_work(size, lambda i: step(next(batches).images, i)),
        }

    ratios = {kind: (Against("constant batch", "lower", "15"),)}
    case = f"batch {size.config.optim.batch_size}, ours, {kind}"
    return Comparison("step", case, ("constant batch", kind), build, ratios)


def _beside(size: Size, name: str, lever: Lever) -> Comparison:
    """One lever a comparison: what a cut leaves is whole."""

    def build() -> dict[str, Workload]:
        batch, ours, other = constant_batch(size), our_step(size), lever_step(size, name, lever)
        return {
            OURS: training_work(size, lambda i: ours(batch, i)),
            name: training_work(size, lambda i: other(batch, i)),
        }

    ratios = {name: (Against(OURS, "lower"),)}
    return Comparison("levers", f"batch {size.config.optim.batch_size}, lever {name}", (OURS, name), build, ratios)


def comparisons(size: Size) -> list[Comparison]:
    """On a CPU without levers: there they change nothing that is measured."""
    beside = [_beside(size, name, lever) for name, lever in levers(size).items()] if size.ours else []
    return [_ladder(size), *(_with_loader(size, kind) for kind in LOADERS), *beside]


def test_step(record):
    record()

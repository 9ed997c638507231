"""The training step, from the plain baseline to ours, one change after the other; and with each loader."""

import os

import pytest

from bench.parts import constant_batch, loader, our_step, train_step, training_work
from bench.plain import endless, plain_step
from bench.suite import FLOOR, Against, Comparison, Size, image_set
from bench.timing import Workload

pytestmark = pytest.mark.timeout(900)  # the network is compiled twice

PLAIN = "eager fp32 + DataLoader"


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


def _with_loader(size: Size) -> Comparison:
    ratios = {name: (Against("constant batch", "lower", "15"),) for name in ("dali", "resident")}

    def build() -> dict[str, Workload]:
        batch, step = constant_batch(size), our_step(size)
        work = {"constant batch": training_work(size, lambda i: step(batch, i))}
        for kind in ratios:
            batches = loader(size, kind)
            work[kind] = training_work(size, lambda i, batches=batches: step(next(batches).images, i))
        return work

    return Comparison("step", f"batch {size.config.optim.batch_size}, ours", ("constant batch", *ratios), build, ratios)


def comparisons(size: Size) -> list[Comparison]:
    return [_ladder(size), _with_loader(size)]


def test_step(record):
    record()

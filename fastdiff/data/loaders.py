"""Two loaders with identical batches: `dali` (NVIDIA DALI pipeline) and `resident` (the whole set on the device).

Training reads one endless global stream of images: epoch after epoch, each a fresh permutation of the set. Which
images and which flips a step gets is a pure function of (seed, step, rank), so both loaders agree bit for bit and a
resumed run sees exactly what the uninterrupted run would have seen.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.datasets import ImageSet
from fastdiff.errors import UserError

LARGEST_PART = 0.8  # of a device's free memory, that the resident images may take
PREFETCH = 2  # batches that DALI prepares ahead of the one in use


class Batch(NamedTuple):
    """What a rank trains on in one step, on the training device.

    Conditions (labels, captions) are not in it: who needs them looks them up by `index` in a table on the device.
    """

    images: Tensor  # uint8 (N, H, W, C), contiguous; or moments of latents, float16
    index: Tensor  # int64 (N,): where each image stands in the set


@lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of the n images in one epoch, int64 (n,), and the flip of each position, bool (n,).

    Sorting raw Philox keys, not `Generator.permutation`: NumPy keeps the raw stream fixed across its versions.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(2 * n)
    order = np.argsort(keys[:n], kind="stable").astype(np.int64)
    flips = keys[n:] >= np.uint64(1 << 63)
    order.flags.writeable = flips.flags.writeable = False  # the cache hands out the same arrays again
    return order, flips


def batch_plan(
    n: int, *, batch_size: int, seed: int, step: int, rank: int = 0, world_size: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Which of n images one rank gets at one step, and which of them mirrored. Pure: no state, no global RNG.

    Element i of the batch is at position p = (step * world_size + rank) * batch_size + i of the global stream, that
    is in epoch p // n at place p % n of that epoch's permutation. So each image comes exactly once an epoch, ranks
    never share an image within an epoch, and the stream is the same for every way of splitting a global batch. A
    batch may span epochs, and be larger than the set. Steps count from 0, and seed is in [0, 2**64).

    Returns:
        indices int64 (batch_size,) in [0, n), flips bool (batch_size,).
    """
    start = (step * world_size + rank) * batch_size
    stop = start + batch_size
    parts = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        part = slice(max(start - epoch * n, 0), stop - epoch * n)
        parts.append([array[part] for array in _epoch_order(n, seed, epoch)])
    indices, flips = map(np.concatenate, zip(*parts, strict=True))
    return indices, flips


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and log variances of the latents of images, in the place of an `ImageSet`."""

    images: np.ndarray  # float16 (N, V, H, W, 2 C): of each image as it is and, with V = 2, mirrored
    name: str  # of the image set


class Loader:
    """An endless iterator of batches; the next one belongs to `step`."""

    def __init__(self, next_batch: Callable[[int], Batch], start_step: int):
        self.step = start_step
        self._next_batch: Callable[[int], Batch] | None = next_batch

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._next_batch is None:
            raise StopIteration
        batch = self._next_batch(self.step)
        self.step += 1
        return batch

    def close(self) -> None:
        """Let go of the pipeline or of the set on the device; the iterator ends."""
        self._next_batch = None


def make_loader(
    kind: str,
    image_set: ImageSet | Moments,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    start_step: int = 0,
    flip: bool = True,
) -> Loader:
    """An endless loader over `image_set`, with the batches of `batch_plan`.

    Args:
        kind: "dali" (images stay in host memory; a prefetching NVIDIA DALI pipeline, its GPU operators on CUDA) or
            "resident" (the whole set on the device, indexed there).
        batch_size: images per rank and step; may exceed the set, which then repeats within a batch.
        device: of the batches; "cpu" or a CUDA device.
        start_step: the first batch's step, to resume a run.
        flip: mirror half of the images left to right, at random.

    Raises:
        UserError: an argument out of range, or NVIDIA DALI missing for kind "dali".
    """
    for name, value, least, limit in (
        ("batch_size", batch_size, 1, math.inf), ("seed", seed, 0, 2**64), ("start_step", start_step, 0, math.inf),
        ("world_size", world_size, 1, math.inf), ("rank", rank, 0, world_size),
    ):  # fmt: skip
        if not least <= value < limit:
            below = f" and below {limit}" if limit < math.inf else ""
            raise UserError(f"{name} is {value}; it must be at least {least}{below}")
    if kind not in LOADERS:
        raise UserError(f"loader is {kind!r}; expected one of {', '.join(LOADERS)}")
    n = len(image_set.images)
    plan = partial(batch_plan, n, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
    next_batch = LOADERS[kind](image_set, plan, batch_size, torch.device(device), start_step, flip)
    return Loader(next_batch, start_step)


def _resident(
    image_set: ImageSet | Moments, plan: Callable, batch_size: int, device: torch.device, start_step: int, flip: bool
):
    """The set is copied to the device once; a step uploads 16 bytes an image (its index and flip)."""
    stored = isinstance(image_set, Moments)  # mirrored images' latents are no mirrored latents
    size, free = image_set.images.nbytes, torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    if size > LARGEST_PART * free:
        raise UserError(
            f"{image_set.name} has {size / 2**30:.1f} GiB, but --loader resident leaves the network a fifth of the "
            f"{free / 2**30:.1f} GiB that are free on {device}: use --loader dali, which reads from the host"
        )
    images = torch.from_numpy(image_set.images).to(device)

    def next_batch(step: int) -> Batch:
        host = torch.from_numpy(np.stack(plan(step=step)))  # int64 (2, N): one upload for both
        if device.type == "cuda":
            host = host.pin_memory()  # else the copy would wait for the device
        index, mirrored = host.to(device, non_blocking=True)
        if stored:
            place = images.shape[1] * index + (mirrored if flip else 0)
            return Batch(images.flatten(0, 1).index_select(0, place), index)
        batch = images.index_select(0, index)
        if flip:
            batch = torch.where(mirrored.bool()[:, None, None, None], batch.flip(2), batch)
        return Batch(batch, index)

    return next_batch


def check_loader(kind: str) -> None:
    """Raise UserError if the loader's packages are not installed."""
    if kind != "dali":
        return
    try:
        import nvidia.dali
        import nvidia.dali.plugin.pytorch  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--loader dali needs NVIDIA DALI (package nvidia-dali-cuda120), which cannot be imported here ({error}): "
            "install it, or use --loader resident, which gives the same batches"
        ) from error


def _dali(
    image_set: ImageSet | Moments, plan: Callable, batch_size: int, device: torch.device, start_step: int, flip: bool
):
    """The host gathers a batch, DALI uploads and flips it, `PREFETCH` batches ahead."""
    check_loader("dali")
    from nvidia.dali import Pipeline, fn
    from nvidia.dali.plugin.pytorch import feed_ndarray

    cuda, stored = device.type == "cuda", isinstance(image_set, Moments)
    if cuda and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())

    def gather(iteration: int) -> tuple[np.ndarray, ...]:
        index, mirrored = plan(step=start_step + iteration)
        if stored:
            return image_set.images[index, mirrored.astype(np.int64) if flip else 0], index
        batch = image_set.images[index], index
        return (*batch, mirrored.astype(np.int32)) if flip else batch

    # The dynamic executor never writes into a buffer that Python still holds, and can order outputs on a stream.
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=min(4, os.cpu_count() or 1),
        device_id=device.index if cuda else None,
        prefetch_queue_depth=PREFETCH,
        exec_dynamic=True,
    )
    with pipeline:
        flips = flip and not stored
        layout = ["HWC", "", ""] if flips else ["HWC", ""]
        images, index, *mirrored = fn.external_source(gather, num_outputs=len(layout), batch=True, layout=layout)
        if cuda:
            images, index = images.gpu(), index.gpu()
        pipeline.set_outputs(fn.flip(images, horizontal=mirrored[0]) if flips else images, index)
    pipeline.build()

    def to_torch(tensor_list, dtype: torch.dtype, stream) -> Tensor:
        """A copy in PyTorch's own memory: no later batch overwrites it, and any stream may use it."""
        tensor = tensor_list.as_tensor()
        return feed_ndarray(tensor, torch.empty(tensor.shape(), dtype=dtype, device=device), cuda_stream=stream)

    def next_batch(step: int) -> Batch:  # the pipeline counts the steps itself, ahead of this one
        stream = torch.cuda.current_stream(device) if cuda else None  # outputs and copies are ordered on it: no wait
        images, index = pipeline.run(stream)
        dtype = torch.float16 if stored else torch.uint8
        return Batch(to_torch(images, dtype, stream), to_torch(index, torch.int64, stream))

    return next_batch


LOADERS = {"dali": _dali, "resident": _resident}

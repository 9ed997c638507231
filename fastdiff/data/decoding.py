"""From encoded images, or arrays of any size, to one uint8 array (N, size, size, 3), in parallel."""

import io
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastdiff.data.cache import new_images
from fastdiff.data.layout import some
from fastdiff.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "QOI", "AVIF")
DARK = "16 bits without a pixel of 4,096 or more, as if of 12 bits, which come out dark; multiply the pixels by 16"
FRAMES = "several frames; only the first is used"
MAX_PIXELS = 2**26  # of one image (8192 x 8192): bounds what a small malicious file can unpack to
CHUNK = 16  # items per task: small images take less time than handing them over one by one

T = TypeVar("T")
R = TypeVar("R")


def _to_8_bits(image: Image.Image, bits: int) -> Image.Image:
    """The upper 8 bits of grey images of 16 or 12 bits, in any of Pillow's modes; other images unchanged."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image) >> (4 if bits == 12 else 8)).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of kind {image.mode!r}, neither 8 nor 16 bits")
    return image


def fit(image: Image.Image, size: int) -> np.ndarray:
    """The image as RGB, with its shorter side resized to `size` (Lanczos, antialiased), and its centre.

    What is transparent lies on white, as viewers show it. Returns uint8 (size, size, 3).
    """
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (size, size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        # Cropping inside the resize is the same picture, without rounding the longer side to whole pixels.
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(image)


def decode(data: bytes, size: int, remark: Callable[[str], object] = lambda what: None) -> np.ndarray:
    """One encoded image (of `FORMATS`), turned upright by its EXIF tag, as uint8 (size, size, 3).

    `remark` is called with `DARK` or `FRAMES` where they apply.

    Raises:
        ValueError: not such an image, damaged, truncated, or of more than `MAX_PIXELS`; says why.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            if getattr(image, "is_animated", False) and image.format != "MPO":  # whose others are thumbnails or depths
                remark(FRAMES)
            stored = f"{image.mode} {image.tile}"  # how the file has it; loading forgets that
            bits = 12 if ";12" in stored else 16 if ";16" in stored else 8
            ImageOps.exif_transpose(image, in_place=True)
            eight = _to_8_bits(image, bits)
            if bits == 16 and np.asarray(eight.convert("RGB")).max() < 16:
                remark(DARK)
            return fit(eight, size)
    except Image.UnidentifiedImageError:
        raise ValueError("it is not an image of a known kind") from None
    except Exception as error:  # on damaged data decoders raise OSError, SyntaxError, struct.error, ...
        raise ValueError(str(error) or type(error).__name__) from error


def decode_all(
    items: Iterable[tuple[int, str, bytes | Path | Exception]],
    n: int,
    size: int,
    origin: Path,
    folder: Path | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Decode `n` images.

    Args:
        items: (place among the n, name, content or file or the error that reading it met) of each, in any order.
        origin: the folder or archive that they are from, for an error's text.
        folder: where large arrays are kept, see `new_images`; None: in memory.

    Returns:
        uint8 (n, size, size, 3), and remarks on images that may not be what they should, one line a kind.

    Raises:
        UserError: names up to ten files that cannot be read or decoded.
    """
    images = new_images(n, size, folder)
    bad: list[tuple[int, str]] = []
    remarks: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)

    def decode_one(item: tuple[int, str, bytes | Path | Exception]) -> None:
        place, name, data = item
        try:
            if isinstance(data, Exception):
                raise ValueError(str(data))
            content = data if isinstance(data, bytes) else data.read_bytes()
            images[place] = decode(content, size, lambda what: remarks[what].append((place, repr(name))))
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            bad.append((place, f"{name!r} ({reason})"))

    for _ in in_parallel(decode_one, items, n, "decoding images"):
        pass
    if bad:
        listed = some([what for _, what in sorted(bad)], 10, "; ")
        count = f"{len(bad):,} of {n:,}"
        raise UserError(f"{origin}: {count} files cannot be read as images: {listed}; replace or delete them")
    return images, [
        f"{len(where):,} of {n:,} images: {what} ({some([name for _, name in sorted(where)])})"
        for what, where in remarks.items()
    ]


def resize_all(arrays: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N, H, W, 3) or grey (N, H, W) of any size to (N, size, size, 3); the arrays themselves if they fit."""
    if arrays.shape[1:] == (size, size, 3):
        return np.ascontiguousarray(arrays)
    images = new_images(len(arrays), size)

    def resize_one(place: int) -> None:
        images[place] = fit(Image.fromarray(arrays[place]), size)

    for _ in in_parallel(resize_one, range(len(arrays)), len(arrays), "resizing images"):
        pass
    return images


def in_parallel(function: Callable[[T], R], items: Iterable[T], total: int, title: str) -> Iterator[R]:
    """`map(function, items)` in threads, with a progress bar on stderr where that is a terminal.

    Threads, because Pillow's decoders, its resize and hashlib all release the GIL. Items are drawn a little ahead of
    the results only, so that an archive is never held in memory as a whole.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    workers = os.cpu_count() or 1
    iterator = iter(items)
    pending: deque[Future[list[R]]] = deque()

    def work(chunk: list[T]) -> list[R]:
        return [function(item) for item in chunk]

    with bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task(title, total=total)
        try:
            while chunk := list(islice(iterator, CHUNK)):
                pending.append(pool.submit(work, chunk))
                if len(pending) > workers:
                    yield from (results := pending.popleft().result())
                    bar.advance(task, len(results))
            while pending:
                yield from (results := pending.popleft().result())
                bar.advance(task, len(results))
        finally:
            for future in pending:
                future.cancel()

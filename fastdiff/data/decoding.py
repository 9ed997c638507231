"""From encoded images, or arrays of any size, to one uint8 array (N, size, size, 3), in parallel."""

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastdiff.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 2**26  # of one image (8192 x 8192): bounds what a small malicious file can unpack to
CHUNK = 16  # items per task: small images take less time than handing them over one by one

T = TypeVar("T")
R = TypeVar("R")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, CMYK and 16-bit grey to RGB; what is transparent lies on white, as viewers show it."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of kind {image.mode!r}, neither 8 nor 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, size: int) -> np.ndarray:
    """The image with its shorter side resized to `size` (Lanczos, antialiased), centre crop: uint8 (size, size, 3)."""
    image = _to_rgb(image)
    if image.size != (size, size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        # Cropping inside the resize is the same picture, without rounding the longer side to whole pixels.
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(image)


def decode(data: bytes, size: int) -> np.ndarray:
    """One encoded image (of `FORMATS`), turned upright by its EXIF tag, as uint8 (size, size, 3).

    Raises:
        ValueError: not such an image, damaged, truncated, or of more than `MAX_PIXELS`; says why.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            ImageOps.exif_transpose(image, in_place=True)
            return fit(image, size)
    except Image.UnidentifiedImageError:
        raise ValueError(f"it is not an image of kind {', '.join(FORMATS)}") from None
    except Exception as error:  # on damaged data decoders raise OSError, SyntaxError, struct.error, ...
        raise ValueError(str(error) or type(error).__name__) from error


def decode_all(items: Iterable[tuple[int, str, bytes | Path]], n: int, size: int) -> np.ndarray:
    """Decode `n` images: uint8 (n, size, size, 3).

    Args:
        items: (place in the result, name for messages, encoded bytes or the file that holds them), in any order.

    Raises:
        UserError: names the first image that cannot be read.
    """
    images = new_images(n, size)

    def decode_one(item: tuple[int, str, bytes | Path]) -> None:
        place, name, data = item
        try:
            images[place] = decode(data if isinstance(data, bytes) else data.read_bytes(), size)
        except (OSError, ValueError) as error:
            raise UserError(f"{name!r} cannot be read as an image: {error}; replace or delete it") from error

    for _ in in_parallel(decode_one, items, n, "decoding images"):
        pass
    return images


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


def new_images(n: int, size: int) -> np.ndarray:
    """An uninitialised uint8 array (n, size, size, 3); a UserError where the memory does not suffice."""
    try:
        return np.empty((n, size, size, 3), dtype=np.uint8)
    except (MemoryError, ValueError) as error:
        needed = n * size * size * 3 / 2**30
        raise UserError(f"{n} images of {size} x {size} need {needed:.1f} GiB: choose a smaller image size") from error


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

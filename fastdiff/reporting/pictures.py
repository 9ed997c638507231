"""Pictures of a run: grids of samples, the forward process and trajectories; and how every figure is written.

Every figure is written to a temporary name and renamed, so that a viewer never sees half an image. Images are numpy
uint8 (..., H, W, 3), and are enlarged by whole factors only: a pixel of the image stays a sharp square.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fastdiff.errors import UsageError
from fastdiff.runs.files import write_atomically

if TYPE_CHECKING:  # Matplotlib takes as long to import as half of torch, and grids of samples do without
    from matplotlib.figure import Figure

# By the suffix of a file's name; none is PNG.
FORMATS = {"": "PNG", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
DPI = 120
NAME_LENGTH = 40  # characters of a row's name that are shown
GRID_CELL, LABELLED_CELL = 64, 80  # pixels: small images are enlarged to at least this; labels need more room


def image_grid(images: np.ndarray, *, columns: int | None = None, scale: int | None = None, gap: int = 2) -> np.ndarray:
    """Lays out uint8 (N, H, W, 3) as one uint8 image, row by row, on white with `gap` pixels around each image.

    `columns` is by default the square root of N, rounded up; `scale` the whole factor that makes an image at least 64
    pixels high. Raises ValueError for another shape or type.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
        raise ValueError(f"images are uint8 (N, H, W, 3) with N > 0, not {images.dtype} {images.shape}")
    scale = scale or math.ceil(GRID_CELL / images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def save_grid(images: np.ndarray, path: Path, *, columns: int | None = None) -> None:
    """Writes `image_grid` of the images, see `write_image`."""
    write_image(image_grid(images, columns=columns), path)


def save_rows(rows: Sequence[np.ndarray], names: Sequence[str], path: Path) -> None:
    """Writes uint8 (n, H, W, 3) each as a row, with its name at the left; rows may be of different lengths."""
    from matplotlib.figure import Figure

    columns, (height, width) = max(map(len, rows)), rows[0].shape[1:3]
    images = np.full((len(rows), columns, height, width, 3), 255, np.uint8)
    for place, row in zip(images, rows, strict=True):
        place[: len(row)] = row
    grid = image_grid(images.reshape(-1, height, width, 3), columns=columns)
    shown = [name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…" for name in names]
    left = 16 + 9 * max(map(len, shown))
    total = left + grid.shape[1]
    figure = Figure(figsize=(total / DPI, grid.shape[0] / DPI), dpi=DPI)
    figure.figimage(grid, left, 0, origin="upper")
    for r, name in enumerate(shown):
        figure.text(
            (left - 8) / total, 1 - (r + 0.5) / len(rows), name, fontsize=9, ha="right", va="center", parse_math=False
        )
    save_figure(figure, path)


def save_labelled(
    groups: np.ndarray, title: str, column_labels: Sequence[str], row_labels: Sequence[str], path: Path
) -> None:
    """Writes uint8 (groups, rows, columns, H, W, 3), labels above the columns and left of each group's rows."""
    from matplotlib.figure import Figure

    count, rows, columns = groups.shape[:3]
    if columns != len(column_labels):
        raise ValueError(f"{columns} columns of images but {len(column_labels)} labels")
    scale = math.ceil(LABELLED_CELL / groups.shape[3])
    blocks = [image_grid(group.reshape(-1, *group.shape[2:]), columns=columns, scale=scale) for group in groups]
    height, width = blocks[0].shape[:2]
    between = 8 if rows > 1 else -2  # rows of one group share the gap
    left = 34 if any(row_labels) else 10
    head = 34 + 14 * max(label.count("\n") + 1 for label in column_labels)
    total_width = max(left + width + 10, 420)
    total_height = head + count * (height + between) - between + 8
    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI)
    figure.text(left / total_width, 1 - 8 / total_height, title, fontsize=9, fontweight="bold", va="top")
    cell = width / columns
    for i, label in enumerate(column_labels):
        x, y = (left + (i + 0.5) * cell) / total_width, 1 - (head - 3) / total_height
        text = figure.text(x, y, label, fontsize=7, ha="center", va="bottom", linespacing=1.2)
        text.set_fontsize(7 * min(1, (cell - 6) / text.get_window_extent().width))
    for g, block in enumerate(blocks):
        top = head + g * (height + between)
        figure.figimage(block, left, total_height - top - height, origin="upper")  # pixel for pixel
        for r, label in enumerate(row_labels):
            y = 1 - (top + (r + 0.5) * height / rows) / total_height
            figure.text((left - 6) / total_width, y, label, fontsize=9, ha="right", va="center")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure, see `write_image`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    write_image(np.asarray(canvas.buffer_rgba())[..., :3], path)


def image_format(path: Path) -> str:
    """Pillow's name of the format that a file's suffix asks for. Raises UsageError for one that is not in FORMATS."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"{path} ends in {suffix}, but pictures are written as {', '.join(filter(None, FORMATS))}.")
    return FORMATS[suffix]


def write_image(image: np.ndarray, path: Path) -> None:
    """Writes uint8 (H, W, 3) in the format of the path's suffix. Raises UsageError for an unknown suffix."""
    kind, buffer = image_format(path), io.BytesIO()
    options = {"optimize": True} if kind == "PNG" else {"quality": 95, "subsampling": 0}
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, kind, **options)
    write_atomically(path, buffer.getvalue())

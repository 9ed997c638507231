"""Figures of a run, as small PNG files: loss, distance and throughput over the steps; grids of samples; trajectories.

Every figure is written to a temporary name and renamed, so that a viewer never sees half an image. Images are numpy
uint8 (..., H, W, 3), and are enlarged by whole factors only: a pixel of the image stays a sharp square.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from fastdiff.reporting.run import Row, write_atomically

PathLike = str | os.PathLike

DPI = 120
BLUE, ORANGE, GREEN, PURPLE, GREY, LIGHT = "#2563eb", "#d97706", "#059669", "#7c3aed", "#6b7280", "#e5e7eb"
GRID_CELL, LABELLED_CELL = 64, 80  # pixels: small images are enlarged to at least this; labels need more room


def plot_loss(rows: Sequence[Row], path: PathLike) -> None:
    """The training loss over the steps: raw values faint, their running mean bold. No file without rows.

    An inset shows the later part by itself, as the fall at the start dwarfs what comes after it.
    """
    steps, losses = _column(rows, "loss")
    if len(steps) == 0:
        return
    figure, axes = _curve_figure("Training loss", "loss", rows)
    smooth = _raw_and_smooth(axes, steps, losses)
    _log_scale(axes, losses)
    if len(steps) >= 100 and smooth[0] > 5 * smooth[-1]:
        later = len(steps) // 5
        inset = axes.inset_axes((0.4, 0.42, 0.58, 0.46))
        _raw_and_smooth(inset, steps[later:], losses[later:], smooth[later:])
        inset.set_ylim(*np.percentile(losses[later:], [0.5, 99.5]))
        inset.set_title("without the first fifth", fontsize=9, loc="left")
        inset.xaxis.set_major_formatter(EngFormatter(sep=""))
        inset.tick_params(labelsize=8)
        inset.grid(color=LIGHT, linewidth=0.8)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0.07, 1), markerscale=2)
    else:
        axes.legend(frameon=False, fontsize=9, markerscale=2)
    _save(figure, path)


def plot_distance(rows: Sequence[Row], path: PathLike) -> None:
    """The Frechet distance of the samples over the steps. No file without rows.

    Values made in different ways (sampler, steps, number of samples, reference) are different curves, and different
    metrics (`fid`, `fd_efficientnet_lite0`) different panels: their numbers do not compare.
    """
    panels: dict[str, dict[str, dict[int, float]]] = {}  # metric -> how it was made -> step -> value
    for row in rows:
        if row.get("value") is not None:
            curve = panels.setdefault(row["metric"], {}).setdefault(_how(row), {})
            curve[row["step"]] = row["value"]
    if not panels:
        return
    figure = Figure(figsize=(7.2, 4.2 * len(panels)), dpi=DPI, layout="constrained")
    for axes, (metric, curves) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        _dress(axes, "Frechet distance of samples to the data (lower is better)", metric, rows)
        for (how, curve), colour in zip(curves.items(), _colours(len(curves)), strict=True):
            steps = sorted(curve)
            values = [curve[step] for step in steps]
            axes.plot(steps, values, "o-", color=colour, linewidth=1.8, markersize=4.5, label=how)
            best = min(steps, key=lambda step: curve[step])
            axes.annotate(
                f"best {curve[best]:.4g}",
                (best, curve[best]),
                xytext=(0, -15),
                textcoords="offset points",
                ha="left" if best == 0 else "center",
                color=colour,
                fontsize=9,
            )
        axes.margins(y=0.15)  # room for the label below the lowest point
        _log_scale(axes, np.array([value for curve in curves.values() for value in curve.values()]))
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def plot_throughput(rows: Sequence[Row], path: PathLike) -> None:
    """Images per second over the steps, with the median. No file without rows."""
    steps, speeds = _column(rows, "images_per_second")
    if len(steps) == 0:
        return
    figure, axes = _curve_figure("Training throughput", "images per second", rows)
    _raw_and_smooth(axes, steps, speeds)
    median = float(np.median(speeds))
    axes.axhline(
        median,
        color=ORANGE,
        linewidth=1.2,
        linestyle="--",
        label=f"median {median:,.0f}" if median >= 100 else f"median {median:.3g}",
    )
    axes.set_ylim(0, 1.15 * float(speeds.max()) or 1)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False, fontsize=9, loc="lower right", markerscale=2)
    _save(figure, path)


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


def save_grid(images: np.ndarray, path: PathLike, *, columns: int | None = None, scale: int | None = None) -> None:
    """Writes `image_grid` of the images as a PNG. No file for no images."""
    if len(images) == 0:
        return
    _write_png(image_grid(images, columns=columns, scale=scale), path)


def plot_forward_noising(x_t_rows: np.ndarray, labels: Sequence[str], path: PathLike) -> None:
    r"""Shows how the forward process turns images into noise: a row for each image, a column for each time.

    Args:
        x_t_rows: uint8 (images, times, H, W, 3).
        labels: what stands above each column, such as "t = 100\n" + r"$\bar\alpha_t$ = 0.897".
        path: the PNG to write; none is written for no images.
    """
    if x_t_rows.size:
        _save_labelled(x_t_rows[:, None], "Forward process: data to noise", labels, [""], path)


def plot_trajectory(x_t: np.ndarray, x0_hat: np.ndarray, times: Sequence[float], path: PathLike) -> None:
    """Shows sampling from noise to image: for each sample x_t, and below it the network's guess of the clean image.

    Args:
        x_t: uint8 (samples, times, H, W, 3).
        x0_hat: of the same shape; the estimate made from the x_t above it.
        times: t of each column, in sampling order. Of more than 8, the figure shows 8 evenly spread ones.
        path: the PNG to write; none is written for no samples.
    """
    if x_t.shape != x0_hat.shape or x_t.shape[1] != len(times):
        raise ValueError(f"x_t {x_t.shape}, x0_hat {x0_hat.shape} and {len(times)} times do not fit together")
    if x_t.size:
        shown = np.unique(np.linspace(0, len(times) - 1, min(8, len(times))).round().astype(int))
        pairs = np.stack([x_t[:, shown], x0_hat[:, shown]], axis=1)
        labels = [f"t = {times[i]:.4g}" for i in shown]
        _save_labelled(
            pairs, r"Sampling: $x_t$ above, the network's $\hat{x}_0$ below", labels, ["$x_t$", r"$\hat{x}_0$"], path
        )


def _save_labelled(
    groups: np.ndarray, title: str, column_labels: Sequence[str], row_labels: Sequence[str], path: PathLike
) -> None:
    """Draws uint8 (groups, rows, columns, H, W, 3), labels above the columns and left of each group's rows."""
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
    _save(figure, path)


def _column(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows where the column holds a number (not None), ordered by step."""
    pairs = sorted((row["step"], row[name]) for row in rows if row.get(name) is not None)
    return np.array([step for step, _ in pairs], np.float64), np.array([value for _, value in pairs], np.float64)


def _how(row: Row) -> str:
    """How an evaluation row was made, for the legend."""
    parts = []
    if row.get("sampler") is not None:
        parts.append(f"{row['sampler']} {row.get('sampler_steps') or '?'} steps")
    if row.get("eta"):
        parts.append(f"eta {row['eta']:g}")
    if row.get("samples") is not None:
        parts.append(f"{row['samples']:,} samples")
    if row.get("reference") is not None:
        parts.append(f"reference {row['reference']}")
    if row.get("feature_size") is not None:
        parts.append(f"at {row['feature_size']} px")
    return ", ".join(parts) or "all"


def _colours(count: int) -> list[str]:
    return [(BLUE, ORANGE, GREEN, PURPLE, GREY)[i % 5] for i in range(count)]


def _curve_figure(title: str, ylabel: str, rows: Sequence[Row]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    _dress(axes, title, ylabel, rows)
    return figure, axes


def _dress(axes: Axes, title: str, ylabel: str, rows: Sequence[Row]) -> None:
    """Title, labels, a light grid, steps below, and the images that they amount to above."""
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    last = max(rows, key=lambda row: row["step"])
    end = max(last["step"], 1)
    axes.set_xlim(-0.04 * end, 1.04 * end)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if last["step"] and last.get("images"):
        batch = last["images"] / last["step"]
        conversion: tuple[Callable, Callable] = (lambda step: step * batch, lambda images: images / batch)
        above = axes.secondary_xaxis("top", functions=conversion)
        above.set_xlabel("images seen", color=GREY, fontsize=9)
        above.xaxis.set_major_formatter(EngFormatter(sep=""))
        above.tick_params(colors=GREY, labelsize=9)
        above.spines["top"].set_color("#d1d5db")


def _raw_and_smooth(axes: Axes, steps: np.ndarray, values: np.ndarray, smooth: np.ndarray | None = None) -> np.ndarray:
    """Plots values as faint points and their running mean as a line, and returns that mean."""
    smooth = _running_mean(values) if smooth is None else smooth
    stride = math.ceil(len(values) / 2500)  # more points than that are only a blot
    few = len(values) < 100
    points = axes.plot(steps[::stride], values[::stride], ".", color=BLUE, markeredgewidth=0, label="logged value")[0]
    points.set(alpha=0.5 if few else 0.3, markersize=8 if few else 5)
    axes.plot(steps, smooth, color=BLUE, linewidth=1.8, label="running mean")
    return smooth


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The centred mean over about 4% of the values; over fewer at the start, where curves are steep."""
    n = len(values)
    index = np.arange(n)
    half = np.minimum(math.ceil(n / 50), index // 4)
    low, high = index - half, np.minimum(index + half, n - 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[high + 1] - sums[low]) / (high + 1 - low)


def _log_scale(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic y axis with plain numbers on it, where all values are positive and spread over a factor of 3."""
    if values.min() <= 0 or values.max() < 3 * values.min():
        return
    axes.set_yscale("log")
    decades = math.log10(values.max() / values.min())
    subs = (1.0,) if decades > 4 else (1.0, 2.0, 5.0) if decades > 2 else (1.0, 2.0, 3.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, path: PathLike) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    _write_png(np.asarray(canvas.buffer_rgba())[..., :3], path)


def _write_png(image: np.ndarray, path: PathLike) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG", optimize=True)
    write_atomically(path, buffer.getvalue())

"""Curves of a run, as small PNG files: loss, distance, throughput and profiles."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, product
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from fastdiff.few_step_section import ALARM
from fastdiff.reporting.pictures import DPI, save_figure
from fastdiff.reporting.progress import format_seconds
from fastdiff.runs.run import Row
from fastdiff.words import counted

BLUE, ORANGE, GREY, LIGHT = "#2563eb", "#d97706", "#6b7280", "#e5e7eb"
COLOURS = (BLUE, ORANGE, "#059669", "#7c3aed", GREY, "#dc2626", "#0891b2", "#db2777", "#854d0e", "#65a30d")
STYLES = tuple(product("os^Dv", COLOURS))  # marker and colour of each curve; the first 50 differ
How = tuple[str, ...]  # the parts of how an evaluation was made; one may hold commas
INSIDE = 4  # legends of more entries are below the axes, where they hide no curve
HOW = {  # column -> its value in words
    "sampler": str,
    "sampler_steps": lambda n: counted(n, "step"),
    "eta": "eta {:g}".format,
    "samples": lambda n: counted(n, "sample"),
    "reference": "reference {}".format,
    "feature_size": "at {} px".format,
    "guidance": "guidance {:g}".format,
    "guidance_interval": "in {}".format,
    "guide": "guide {}".format,
}
USUAL = {"eta": 0.0, "guidance_interval": "off"}  # which need no words


def plot_run(
    train_rows: Sequence[Row], eval_rows: Sequence[Row], noise_rows: Sequence[Row], folder: Path,
    *, teacher: Sequence[Row] = (),
) -> None:  # fmt: skip
    """The curves of a run, a PNG each if there are rows: loss, throughput, denoising, fid, few-step, loss-by-noise."""
    plot_loss(train_rows, folder / "loss.png")
    plot_throughput(train_rows, folder / "throughput.png")
    plot_denoising(train_rows, folder / "denoising.png")
    plot_distance(eval_rows, folder / "fid.png")
    plot_few_steps(eval_rows, folder / "few-step.png", teacher=teacher if eval_rows else ())
    plot_loss_by_noise(noise_rows, folder / "loss-by-noise.png")


def plot_loss(rows: Sequence[Row], path: Path) -> None:
    """The training loss over the steps: raw values faint, their running mean bold. No file without rows.

    An inset shows the later part, which the fall at the start would dwarf.
    """
    steps, losses = _column(rows, "loss")
    if len(steps) == 0:
        return
    figure, axes = _figure("Training loss", "step", "loss")
    _step_axis(axes, rows)
    smooth = _raw_and_smooth(axes, steps, losses)
    _log_scale(axes, losses)
    legend = axes.legend(frameon=False, fontsize=9, markerscale=2)
    if len(steps) >= 100 and smooth[0] > 5 * smooth[-1]:
        later = len(steps) // 5
        inset = axes.inset_axes((0.4, 0.42, 0.58, 0.46))
        _raw_and_smooth(inset, steps[later:], losses[later:], smooth[later:])
        inset.set_ylim(*np.percentile(losses[later:], [0.5, 99.5]))
        inset.set_title("without the first fifth", fontsize=9, loc="left")
        inset.xaxis.set_major_formatter(EngFormatter(sep=""))
        inset.tick_params(labelsize=8)
        inset.grid(color=LIGHT, linewidth=0.8)
        legend.set_loc("upper left")
        legend.set_bbox_to_anchor((0.07, 1), axes.transAxes)
    save_figure(figure, path)


def plot_distance(rows: Sequence[Row], path: Path) -> None:
    """The Frechet distance of the samples over the steps. No file without rows.

    Values made in different ways (sampler, steps, number of samples, reference) are different curves, and different
    metrics (`fid`, `fd_efficientnet_lite0`) different panels: their numbers do not compare.
    """
    panels: dict[str, dict[How, dict[int, float]]] = {}  # metric -> how it was made -> step -> value
    for row in rows:
        if row.get("value") is not None:
            curve = panels.setdefault(row["metric"], {}).setdefault(_how(row), {})
            curve[row["step"]] = row["value"]
    if not panels:
        return
    figure = Figure(figsize=(7.2, 4.2 * len(panels)), dpi=DPI, layout="constrained")
    for axes, (metric, curves) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        _dress(axes, "Frechet distance of samples to the data (lower is better)", "step", metric)
        _step_axis(axes, rows)
        common, names = _told_apart(list(curves))
        for name, curve, style in zip(names, curves.values(), cycle(STYLES)):
            steps = sorted(curve)
            best = min(steps, key=lambda step: curve[step])
            label = f"{name}: best {curve[best]:.4g} at step {best:,}"
            _line(axes, steps, [curve[step] for step in steps], style, label)
        _log_scale(axes, np.array([value for curve in curves.values() for value in curve.values()]))
        _legend(figure, axes, common)
    save_figure(figure, path)


def plot_few_steps(rows: Sequence[Row], path: Path, *, teacher: Sequence[Row] = ()) -> None:
    """The Frechet distance against the sampler's steps, from the newest evaluation of each, without guidance.

    No file unless some sampler was measured in more than one number of steps.

    Args:
        teacher: rows of the network that this one was taught by or began from.
    """
    curves: dict[tuple[str, How], dict[int, float]] = {}  # (metric, how it was made) -> steps -> value
    for whose, told in (("teacher, ", teacher), ("", rows)):
        for row in told:  # a later one takes an earlier one's place
            if row.get("value") is not None and row.get("sampler_steps") and row.get("guidance", 1.0) == 1.0:
                how = f"{whose}{row['sampler']}", counted(row["samples"], "sample")
                curves.setdefault((row["metric"], how), {})[row["sampler_steps"]] = row["value"]
    if all(len(curve) < 2 for curve in curves.values()):
        return
    metrics = dict.fromkeys(metric for metric, _ in curves)
    title = "Frechet distance against sampling steps (lower is better)"
    figure, axes = _figure(title, "steps", ", ".join(metrics))
    common, names = _told_apart(
        [how if len(metrics) == 1 else (f"{metric}: {how[0]}", *how[1:]) for metric, how in curves]
    )
    for name, curve, style in zip(names, curves.values(), cycle(STYLES)):
        steps = sorted(curve)
        _line(axes, steps, [curve[n] for n in steps], style, name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    _log_scale(axes, np.array([value for curve in curves.values() for value in curve.values()]))
    _legend(figure, axes, common)
    save_figure(figure, path)


def plot_guidance(rows: Sequence[Row], path: Path) -> None:
    """The Frechet distance against the guidance scale w, a line for each interval, and how many samples are of the
    class that was asked for."""
    title = "Frechet distance against guidance (lower is better)"
    figure, axes = _figure(title, "guidance scale w", rows[0]["metric"])
    agreement = axes.twinx() if "label_agreement" in rows[0] else None
    for interval, style in zip(dict.fromkeys(row["guidance_interval"] for row in rows), cycle(STYLES)):
        own = sorted((row for row in rows if row["guidance_interval"] == interval), key=lambda row: row["guidance"])
        scales = [row["guidance"] for row in own]
        label = "at all levels" if interval == "off" else f"at sigma / alpha in {interval}"
        _line(axes, scales, [row["value"] for row in own], style, label)
        marker, colour = style
        best = min(own, key=lambda row: row["value"])
        axes.plot(best["guidance"], best["value"], "o", color=colour, markersize=10, fillstyle="none")
        _note(axes, f"{best['value']:.4g}", (best["guidance"], best["value"]), colour)
        if agreement is not None:
            agreement.plot(
                scales, [100 * row["label_agreement"] for row in own], f"{marker}--", color=colour, markersize=3
            )
    if agreement is not None:
        ceiling = 100 * rows[0]["label_agreement_real"]
        agreement.axhline(ceiling, color=GREY, linewidth=1, linestyle=":")
        agreement.annotate(f"real images {ceiling:.0f}%", (1, ceiling), xycoords=("axes fraction", "data"), ha="right",
                           va="bottom", fontsize=8, color=GREY)  # fmt: skip
        agreement.set_ylabel("dashed: samples of the class asked for, %")
        agreement.set_ylim(0, 105)
        agreement.spines["top"].set_visible(False)
    axes.margins(y=0.15)
    _legend(figure, axes)
    save_figure(figure, path)


def plot_denoising(rows: Sequence[Row], path: Path) -> None:
    """The denoising error over the steps, which a run for few steps has. No file without rows."""
    steps, errors = _column(rows, "denoising_error")
    if len(steps) == 0:
        return
    figure, axes = _figure("Denoising error: does the network still know what it knew?", "step", "mean squared error")
    _step_axis(axes, rows)
    _line(axes, steps, errors, STYLES[0], "")
    _log_scale(axes, errors)
    least = float(errors.min())
    label = f"warning above {ALARM * least:.3g}, {ALARM:g} times the smallest"
    axes.axhline(ALARM * least, color=ORANGE, linewidth=1.2, linestyle="--", label=label)
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_throughput(rows: Sequence[Row], path: Path) -> None:
    """Images per second over the steps, with the median. No file without rows."""
    steps, speeds = _column(rows, "images_per_second")
    if len(steps) == 0:
        return
    figure, axes = _figure("Training throughput", "step", "images per second")
    _step_axis(axes, rows)
    _raw_and_smooth(axes, steps, speeds)
    median = float(np.median(speeds))
    label = f"median {median:,.0f}" if median >= 100 else f"median {median:.3g}"
    axes.axhline(median, color=ORANGE, linewidth=1.2, linestyle="--", label=label)
    axes.set_ylim(0, 1.15 * float(speeds.max()) or 1)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False, fontsize=9, loc="lower right", markerscale=2)
    save_figure(figure, path)


def plot_profile(categories: Mapping[str, float], title: str, path: Path) -> None:
    """Where a step's time goes: a bar for each category that takes any, with its milliseconds and share.

    Args:
        categories: name -> milliseconds, in the order to be shown; they add up to the step. `idle` is drawn in grey.
    """
    shown = {name: ms for name, ms in categories.items() if ms > 0}
    total = sum(shown.values())
    figure = Figure(figsize=(7.2, 1.2 + 0.34 * len(shown)), dpi=DPI, layout="constrained")
    axes: Axes = figure.subplots()
    _dress(axes, title, f"milliseconds of a step of {total:.4g} ms, under the profiler", "")
    axes.grid(visible=False, axis="y")
    axes.barh(list(shown), list(shown.values()), color=[GREY if name == "idle" else BLUE for name in shown], height=0.7)
    for name, ms in shown.items():
        axes.annotate(f" {ms:.3g} ms, {ms / total:.0%}", (ms, name), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * max(shown.values()))
    save_figure(figure, path)


def plot_track(rows: Sequence[Row], path: Path) -> None:
    """Images per second (left axis) and the Frechet distance (right axis) over the steps. No file without rows.

    Args:
        rows: of bench/track.py. Distances made in different ways are different curves.
    """
    rows = sorted(rows, key=lambda row: row["step"])
    if not rows:
        return
    after = format_seconds(rows[-1]["seconds_total"])
    figure, speed = _figure(
        "Throughput beside the Frechet distance", f"step (the last row after {after})", "images per second"
    )
    _step_axis(speed, rows)
    steps, values = _column(rows, "images_per_second")
    lines = _line(speed, steps, values, ("s", BLUE), "images per second")
    speed.set_ylim(0, 1.15 * float(values.max(initial=0)) or 1)
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    speed.yaxis.label.set_color(BLUE)
    distance = speed.twinx()
    kinds = dict.fromkeys((row["metric"], _how(row)) for row in rows)
    for (metric, how), style in zip(kinds, cycle(STYLES[1:])):
        steps, values = _column([row for row in rows if (row["metric"], _how(row)) == (metric, how)], metric)
        lines += _line(distance, steps, values, style, f"{metric}: {', '.join(how)}")
        if len(steps):
            _note(distance, f"{values[-1]:.4g}", (steps[-1], values[-1]), "black", above=7, ha="right")
    distance.set_ylabel(" / ".join(dict.fromkeys(metric for metric, _ in kinds)) + " (lower is better)", color=ORANGE)
    distance.margins(y=0.15)
    distance.spines["top"].set_visible(False)
    figure.legend(handles=lines, frameon=False, fontsize=8, loc="outside lower center")
    save_figure(figure, path)


def plot_loss_by_noise(rows: Sequence[Row], path: Path) -> None:
    """The training loss at each noise level, for up to 5 stages of the run, over the share of the last one's images.

    Args:
        rows: `step`, and lists over the bins: `log_snr` (centre), `loss` (mean, None without images), `images`.
        path: the PNG to write; none is written without rows.
    """
    if not rows:
        return
    shown = [rows[i] for i in np.linspace(0, len(rows) - 1, min(5, len(rows))).round().astype(int)]
    figure, axes = _figure("Training loss by noise level", "log-SNR (noise on the left, image on the right)", "loss")
    centres, images = np.array(shown[-1]["log_snr"]), np.array(shown[-1]["images"], np.float64)
    below = axes.twinx()
    bars = below.bar(centres, images / max(images.sum(), 1), width=0.9, color=LIGHT, label="share of images")
    below.set_ylim(0, 3 * (images.max() / max(images.sum(), 1) or 1))
    below.set_axis_off()
    axes.set_zorder(below.get_zorder() + 1)
    axes.patch.set_visible(False)
    losses = np.array([row["loss"] for row in shown], np.float64)  # None becomes nan: a gap in the line
    for i, row in enumerate(shown):
        colour = GREY if i < len(shown) - 1 else BLUE
        label = f"up to step {row['step']:,}"
        axes.plot(row["log_snr"], losses[i], ".-", color=colour, alpha=(i + 1) / len(shown), label=label)
    if np.isfinite(losses).any():
        _log_scale(axes, losses[np.isfinite(losses)])
    _legend(figure, axes, bars=bars)
    save_figure(figure, path)


def _column(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows where the column holds a number (not None), ordered by step."""
    pairs = sorted((row["step"], row[name]) for row in rows if row.get(name) is not None)
    return np.array([step for step, _ in pairs], np.float64), np.array([value for _, value in pairs], np.float64)


def _how(row: Row) -> How:
    """How an evaluation row was made, for the legend."""
    told = (words(row[name]) for name, words in HOW.items() if row.get(name) not in (None, USUAL.get(name)))
    return tuple(told) or ("all",)


def _told_apart(hows: Sequence[How]) -> tuple[str, list[str]]:
    """What all ways have in common, and the rest of each, which keeps its first part, such as the sampler."""
    common = [part for part in hows[0][1:] if all(part in how for how in hows)]
    return ", ".join(common), [", ".join(part for part in how if part not in common) for how in hows]


def _figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    _dress(axes, title, xlabel, ylabel)
    return figure, axes


def _dress(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _step_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """Steps below, and the images that they amount to above."""
    last = max(rows, key=lambda row: row["step"])
    end = max(last["step"], 1)
    axes.set_xlim(-0.04 * end, 1.04 * end)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if last["step"] and last.get("images"):
        batch = last["images"] / last["step"]
        above = axes.secondary_xaxis("top", functions=(lambda step: step * batch, lambda images: images / batch))
        above.set_xlabel("images seen", color=GREY, fontsize=9)
        above.xaxis.set_major_formatter(EngFormatter(sep=""))
        above.tick_params(colors=GREY, labelsize=9)
        above.spines["top"].set_color("#d1d5db")


def _line(axes: Axes, x: ArrayLike, y: ArrayLike, style: tuple[str, str], label: str) -> list[Line2D]:
    marker, colour = style
    return axes.plot(x, y, f"{marker}-", color=colour, linewidth=1.8, markersize=4.5, label=label)


def _legend(figure: Figure, axes: Axes, title: str = "", *, bars: Container | None = None) -> None:
    """The labels of the curves: inside the axes, or, if there are many, below them in a figure that grows for it."""
    handles = [*axes.get_legend_handles_labels()[0], *([] if bars is None else [bars])]
    title, *labels = (textwrap.fill(text, 90) for text in (title, *(str(each.get_label()) for each in handles)))
    if len(labels) <= INSIDE:
        axes.legend(handles, labels, title=title, title_fontsize=9, frameon=False, fontsize=9)
        return
    columns = 2 if max(map(len, labels)) <= 45 else 1
    lines = math.ceil(sum(1 + label.count("\n") for label in labels) / columns) + 1 + title.count("\n")
    figure.set_figheight(figure.get_figheight() + 0.18 * lines)
    axes.legend(handles, labels, title=title, title_fontsize=8, frameon=False, fontsize=8, ncols=columns,
                loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=5)  # fmt: skip


def _note(
    axes: Axes, text: str, point: tuple[float, float], colour: str, *, above: int = -15, ha: str = "center"
) -> None:
    """Writes a value `above` points above its point."""
    axes.annotate(text, point, xytext=(0, above), textcoords="offset points", ha=ha, color=colour, fontsize=9)


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

"""A profile as people read it: summary.md, and a bar for each category beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastdiff.reporting import plots
from fastdiff.reporting.profiling import CATEGORIES, Profile
from fastdiff.runs.files import write_atomically
from fastdiff.words import counted

TOP = 15
IDLE_LIMIT = 0.15  # of the step; above it the device waits too much for its kernels to be the first thing to look at
RULE = (
    f"Rule: more than {IDLE_LIMIT:.0%} idle comes first (host syncs if there are any, else the host's own time); "
    "else the largest category."
)
ADVICE = {
    "conv": "compare its kernels' FLOP/s with the machine's matrix product; look for layout changes around them and "
    "for channel counts that fill no tile",
    "norm": "compare its bandwidth with a device copy; fuse what is read again around it",
    "attention": "see that the fused kernel runs, and that q, k and v come from one product",
    "matmul": "merge small products that share an input",
    "pointwise": "fuse it into its neighbours: torch.compile, or a larger kernel of ours",
    "optimizer": "compare its bandwidth with a device copy; one fused pass over flat buffers is the floor",
    "data": "prepare batches beside the step, not in it",
    "copy": "find who asks for the copies: casts, concatenations, changes of layout",
    "other": "look at the names in the table: a rule for them may be missing in fastdiff/reporting/profiling.py",
}


def write_report(
    directory: Path,
    profile: Profile,
    *,
    title: str,
    plain_step: float,
    facts: Mapping[str, str],
    memory: tuple[str, int],
) -> None:
    """Write `summary.md` and `time.png` into `directory`.

    Args:
        plain_step: milliseconds of a step without the profiler.
        facts: device, date, versions and the like: one line each.
        memory: what was measured, and the peak in bytes, of the process so far.
    """
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [
        f"A step takes **{plain_step:.4g} ms** without the profiler and {profile.step / 1e3:.4g} ms with it "
        f"(means of {counted(profile.steps, 'step')} each). What follows was recorded with it.",
        "",
        "![time by category](time.png)",
        "",
        *_categories(profile),
        "",
        *_ranges(profile),
        *_counts(profile, memory),
        "",
        *_kernels(profile),
        "",
        f"**Next:** {next_step(profile)} {RULE}",
    ]
    write_atomically(directory / "summary.md", ("\n".join(lines) + "\n").encode())
    milliseconds = {name: profile.categories[name] / 1e3 for name in CATEGORIES}
    plots.plot_profile(milliseconds, title, directory / "time.png")


def append_uncaptured(directory: Path, profile: Profile) -> None:
    """Add the tables of `profile` to the summary of a captured step, whose replay has no ranges and no bandwidth."""
    heading = "## The same step uncaptured, which has ranges and bandwidth"
    # A captured step's activations lie in the graph's own memory, which no timeline shows.
    lines = [heading, "", *_categories(profile), "", *_ranges(profile), _timeline(profile), "", *_kernels(profile)]
    summary = (directory / "summary.md").read_text()
    write_atomically(directory / "summary.md", (f"{summary}\n" + "\n".join(lines) + "\n").encode())


def next_step(profile: Profile) -> str:
    """What to look at first, by RULE."""
    share = {name: time / profile.step for name, time in profile.categories.items()}
    idle = share.pop("idle")
    if idle > IDLE_LIMIT:
        if profile.gpu and profile.syncs >= 1:
            return f"the GPU is idle for {idle:.0%} (host syncs a step: {profile.syncs:.3g}): take those out."
        if profile.gpu:
            launches = counted(round(profile.launches), "launch", "launches")
            return (
                f"the GPU is idle for {idle:.0%} with {launches} a step and no host sync: the "
                "host is too slow for it; capture the step in a CUDA graph, or look for gaps where it waits for data."
            )
        return (
            f"{idle:.0%} of the step is outside of all ops: Python and their dispatch; fewer and larger ops "
            "(torch.compile, larger batches) cut it."
        )
    largest = max(share, key=lambda name: share[name])
    return f"{largest} is the largest part with {share[largest]:.0%}: {ADVICE[largest]}."


def _categories(profile: Profile) -> list[str]:
    ordered = sorted(profile.categories.items(), key=lambda item: -item[1])
    rows = [f"| {name} | {time / 1e3:.3f} | {time / profile.step:.1%} |" for name, time in ordered if time > 0]
    return ["| category | ms | share |", "|---|---:|---:|", *rows, f"| step | {profile.step / 1e3:.3f} | 100.0% |"]


def _ranges(profile: Profile) -> list[str]:
    if not profile.ranges:
        return []
    device = "ms of its kernels" if profile.gpu else "ms in its ops"
    rows = [f"| {name} | {host / 1e3:.3f} | {own / 1e3:.3f} |" for name, (host, own) in profile.ranges.items()]
    return [f"| part | ms on the host | {device} |", "|---|---:|---:|", *rows, ""]


def _counts(profile: Profile, memory: tuple[str, int]) -> list[str]:
    if profile.gpu:
        launches = f"launches a step: {profile.launches:,.1f} calls, {profile.kernels:,.1f} kernels and copies"
        syncs = "host syncs a step"
    else:
        launches = f"ops a step: {profile.kernels:,.1f}; {profile.launches:,.1f} of them are called by no other op"
        syncs = "tensors read by the host a step (each would wait, were it on a GPU)"
    return [
        f"- {launches}",
        f"- {syncs}: {profile.syncs:.3g}",
        _timeline(profile),
        f"- memory peak of the process, {memory[0]}: {memory[1] / 2**20:,.1f} MiB",
    ]


def _timeline(profile: Profile) -> str:
    above = "" if profile.gpu else " above what was there before"
    peak = "not recorded" if profile.memory is None else f"{profile.memory / 2**20:,.1f} MiB"
    return f"- memory, allocated at most{above}, by the timeline: {peak}"


def _kernels(profile: Profile) -> list[str]:
    what = "kernel" if profile.gpu else "op (its own time)"
    lines = [f"| {what} | category | calls | ms | share | GB/s |", "|---|---|---:|---:|---:|---:|"]
    for row in profile.rows[:TOP]:
        speed = "-" if row.bytes_per_second is None else f"{row.bytes_per_second / 1e9:,.1f}"
        name = row.name.replace("|", "\\|")
        name = name if len(name) <= 90 else f"{name[:87]}..."
        lines.append(
            f"| `{name}` | {row.category} | {row.calls:,.4g} | {row.time / 1e3:.3f} | {row.time / profile.step:.1%} "
            f"| {speed} |"
        )
    return lines

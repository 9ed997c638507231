"""The performance bars: what a measured ratio has to reach, and what it should.

python bench/bars.py gpu-run     writes the table of bars from what bench/gpu_run.py measured and others counted
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from fastdiff.cli import run_command
from fastdiff.errors import UserError

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Bar:
    """A bar on a ratio.

    better   whether the ratio should be small (a cost over a floor) or large (a gain over a baseline)
    least    what it must reach
    aim      what it should reach; None where there is only a limit
    on_cpu   whether it holds on a CPU too
    """

    better: Better
    least: float
    aim: float | None
    on_cpu: bool = False

    def reached(self, value: float, limit: float) -> bool:
        """Whether the value is on the right side of `least` or `aim`."""
        return value <= limit if self.better == "lower" else value >= limit

    def holds(self, value: float) -> str:
        """`aim`, `met` or `missed`."""
        if self.aim is not None and self.reached(value, self.aim):
            return "aim"
        return "met" if self.reached(value, self.least) else "missed"


BARS: dict[str, Bar] = {
    "7": Bar("higher", 10.0, 50.0, on_cpu=True),  # loader images/s over training images/s
    "8 forward": Bar("lower", 1.25, 1.1),  # GroupNorm + SiLU over a device copy of the same bytes
    "8 backward": Bar("lower", 1.4, 1.2),
    "9": Bar("lower", 1.15, 1.05),  # EMA update over a device copy of the same bytes
    "10": Bar("higher", 1.2, 1.4),  # Adam + EMA: torch fused + foreach over ours
    "11": Bar("lower", 2.2, 1.7),  # step over the compute floor by the measured matrix product
    "12": Bar("higher", 1.25, 1.4),  # step: torch.compile + bf16 + channels_last with stock operators over ours
    "13": Bar("higher", 6.0, 10.0),  # step: eager fp32 with a DataLoader over ours
    "14 batch 1": Bar("higher", 4.0, 6.0),  # DDIM-50: uncaptured over captured
    "14 batch 16": Bar("higher", 2.5, 4.0),
    "14 batch 256": Bar("higher", 1.05, 1.2),
    "15": Bar("lower", 1.02, 1.005),  # step with loader over step on a constant batch
    "16": Bar("lower", 0.25, 0.1),  # evaluation over the training steps between two of them
    "guard": Bar("lower", 0.005, None, on_cpu=True),  # what notices numbers that are not finite, over a training step
    "sampler": Bar("lower", 1.05, None, on_cpu=True),  # a sampler's network evaluation over the bare network's
}


def verdict(name: str, value: float) -> str:
    """One phrase, such as `bar 9: 1.07, at most 1.15 met, aim 1.05 missed`."""
    bar = BARS[name]

    def judged(limit: float) -> str:
        return f"{limit:g} {'met' if bar.reached(value, limit) else 'missed'}"

    words = f"bar {name}: {value:.3g}, at {'most' if bar.better == 'lower' else 'least'} {judged(bar.least)}"
    return words if bar.aim is None else f"{words}, aim {judged(bar.aim)}"


# The table

# Counted without a GPU: 1 to 3 by step_counts.py, 4 and 5 by aot.py. 6 is what tests see.
COUNTED: dict[str, Bar] = {
    "1": Bar("lower", 1.6, 1.05),
    "2a": Bar("higher", 1.5, 1.8),
    "2b": Bar("higher", 1.25, 1.5),
    "3": Bar("higher", 5.0, 8.0),
    "4": Bar("lower", 0, None),
    "5": Bar("higher", 1.0, None),
    "6": Bar("lower", 0, None),
}
LINES: dict[str, tuple[str, ...]] = {  # what -> its bars
    "GroupNorm + SiLU: bytes requested / floor": ("1",),
    "bytes of a step: PyTorch's operators / ours; the best without our kernels / ours": ("2a", "2b"),
    "launches of a step: PyTorch's operators / ours": ("3",),
    "kernels that spill, on sm_80, 90 and 100": ("4",),
    "16-byte accesses / all": ("5",),
    "graph breaks, recompiles, host syncs of a step": ("6",),
    "loader / training, images a second": ("7",),
    "GroupNorm + SiLU / device copy: forward; backward": ("8 forward", "8 backward"),
    "update of the average / device copy": ("9",),
    "Adam and average: PyTorch's fused / ours": ("10",),
    "step / compute floor": ("11",),
    "step: PyTorch's operators, compiled, bf16 / ours": ("12",),
    "step: eager float32 with a DataLoader / ours": ("13",),
    "DDIM-50 uncaptured / captured, batch 1; 16; 256": ("14 batch 1", "14 batch 16", "14 batch 256"),
    "step with loader / on a constant batch": ("15",),
    "evaluation / training between two of them": ("16",),
}
Found = dict[str, list[float]]  # bar -> what was measured or counted, several times for several shapes or loaders


def counted(results: Path) -> Found:
    """Bars 1 to 5, from bench/results."""
    found = {name: [value] for name, value in json.loads((results / "step_counts.json").read_text())["bars"].items()}
    (spills, _), (wide, accesses) = re.findall(
        r"^- .*: (\d+) of (\d+)$", (results / "aot.md").read_text(), re.MULTILINE
    )
    return found | {"4": [float(spills)], "5": [int(wide) / int(accesses)]}


def measured(run: Path) -> tuple[Found, str]:
    """Bars 6 to 16, from a folder of bench/gpu_run.py; and what they were measured on."""
    from bench.gpu_run import MUST_PASS, read_run
    from bench.results import Results, summary

    results, found = Results.read(run / "rows.json"), {}
    for row in results.rows:
        for ratio in row.ratios:
            if ratio.verdict is not None:
                found.setdefault(ratio.verdict.removeprefix("bar ").partition(":")[0], []).append(ratio.value)
    ended = {stage["name"]: stage["ended"] for stage in read_run(run)["stages"]}
    if results.environment["cuda"] is not None and ended.get(MUST_PASS) == "done":  # else they were skipped
        found["6"] = [0]
    return found, summary(results)


def table(found: Found, what: str) -> str:
    """As Markdown. Of several values the worst counts."""
    lines = [f"# Bars\n\n{what}.\n", "| # | what | value | at least | aim | holds |", "|---|---|---|---|---|---|"]
    for number, (line, names) in enumerate(LINES.items(), start=1):
        cells: list[tuple[str, str, str, str]] = []
        for name in names:
            bar, values = (BARS | COUNTED)[name], found.get(name)
            sign = "<=" if bar.better == "lower" else ">="
            limits = f"{sign} {bar.least:g}", "" if bar.aim is None else f"{sign} {bar.aim:g}"
            if not values:
                cells.append(("-", *limits, "not measured"))
                continue
            best, worst = sorted((min(values), max(values)), reverse=bar.better == "higher")
            span = f"{worst:.3g}" + (f" (best {best:.3g})" if best != worst else "")
            cells.append((span, *limits, bar.holds(worst)))
        lines.append(f"| {number} | {line} | {' | '.join('; '.join(column) for column in zip(*cells, strict=True))} |")
    return "\n".join(lines) + "\n"


def main(run: Annotated[Path, tyro.conf.Positional], /, out: Path | None = None) -> int:
    """Write the table of bars.

    Args:
        run: the folder that bench/gpu_run.py made.
        out: Markdown file; default bench/results/bars-<device>.md. It must be named for a trial in tiny sizes.
    """
    from bench.gpu_run import read_run
    from bench.results import Results
    from fastdiff.runtime.device import slug

    results, tiny = Path(__file__).parent / "results", read_run(run)["size"] == "tiny"
    if tiny and out is None:
        raise UserError(f"{run} is a trial in tiny sizes, whose values mean nothing; name a file with --out.")
    found, what = measured(run)
    text = table(
        counted(results) | found, f"A trial in tiny sizes, whose values mean nothing: {what}" if tiny else what
    )
    out = out or results / f"bars-{slug(Results.read(run / 'rows.json').environment['device'])}.md"
    out.write_text(text)
    print(f"{text}\nwrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main)))

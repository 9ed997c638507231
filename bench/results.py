"""The suite's results: rows, their file, and their tables."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.bars import Better
from fastdiff.errors import UserError
from fastdiff.runs.files import write_atomically

FORMAT = "fastdiff-bench-1"


@dataclass(frozen=True)
class Ratio:
    """A row's time compared with another one, measured in the same rounds.

    against   what the row is compared with
    value     `lower` is better: own time / other time; `higher` is better: other time / own time
    verdict   of a bar, or None where there is none on this device
    """

    against: str
    value: float
    better: Better
    verdict: str | None


@dataclass(frozen=True)
class Row:
    """One benchmark: median and distance of the quartiles in seconds a call, and what follows from them.

    share is of the machine's own ceiling: of its matrix product where FLOP are counted, else of its device copy.
    """

    group: str
    case: str
    variant: str
    seconds: float
    spread: float
    rounds: int
    calls: int
    images_s: float | None
    gb_s: float | None
    tflop_s: float | None
    share: float | None
    ratios: tuple[Ratio, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.group, self.case, self.variant


def _row(found: dict[str, Any]) -> Row:
    fields: dict[str, Any] = found | {"ratios": tuple(Ratio(**r) for r in found["ratios"])}
    return Row(**fields)


@dataclass(frozen=True)
class Results:
    """A run of the suite. ceilings: `bytes_s` and `flops_s`; see machine.ceilings."""

    environment: dict[str, Any]
    ceilings: dict[str, float]
    rows: list[Row]

    def write(self, path: Path) -> None:
        """As JSON, one row a line, so that two runs can be told apart by eye too."""
        rows = ",\n".join("  " + json.dumps(asdict(row)) for row in self.rows)
        head = json.dumps({"format": FORMAT, "environment": self.environment, "ceilings": self.ceilings}, indent=1)
        write_atomically(path, f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'.encode())

    def after(self, earlier: "Results") -> "Results":
        """With the rows of an earlier run that are not measured anew."""
        mine = {row.key for row in self.rows}
        return replace(self, rows=[row for row in earlier.rows if row.key not in mine] + self.rows)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """The inverse of `write`. Raises UserError for a file that is not there, or not of this suite."""
        try:
            found = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}); name a JSON file of bench/results.") from error
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is no JSON ({error}); name a JSON file of bench/results.") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise UserError(f"{path} is no result of this suite (format {FORMAT}); write one with `pytest bench`.")
        try:
            rows = [_row(row) for row in found["rows"]]
            results = cls(dict(found["environment"]), dict(found["ceilings"]), rows)
            finite = all(math.isfinite(v) for row in rows for v in (row.seconds, *(r.value for r in row.ratios)))
            if not finite or "device" not in results.environment or not {"bytes_s", "flops_s"} <= set(results.ceilings):
                raise ValueError("a number or name is missing")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); write it anew with `pytest bench`.") from error
        return results


def duration(seconds: float) -> str:
    """With three digits and a unit: 12.3 ms."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor or unit == "µs":
            return f"{seconds / factor:.3g} {unit}" if seconds / factor < 1000 else f"{seconds / factor:.0f} {unit}"
    raise AssertionError


def rate(row: Row) -> str:
    """What a row achieves: images, bandwidth, arithmetic."""
    parts = (
        []
        if row.images_s is None
        else [f"{row.images_s:,.0f} img/s" if row.images_s >= 10 else f"{row.images_s:.2g} img/s"]
    )
    if row.tflop_s is not None:
        parts.append(f"{row.tflop_s:.3g} TFLOP/s")
    elif row.gb_s is not None:
        parts.append(f"{row.gb_s:.3g} GB/s")
    return ", ".join(parts)


def ratio_text(ratio: Ratio) -> str:
    """The ratio in words: 1.32x the speed of stock; 1.07x the time of a copy."""
    return f"{ratio.value:.3g}x the {'speed' if ratio.better == 'higher' else 'time'} of {ratio.against}"


COLUMNS = ("group", "case", "variant", "median", "rate", "of ceiling", "ratio", "bar")


def cells(row: Row, *, newline: str) -> tuple[str, ...]:
    """A row of the tables, by COLUMNS; `newline` stands between several ratios or verdicts."""
    share = "" if row.share is None else f"{row.share:.1%}" if row.share >= 1e-3 else "< 0.1%"
    ratios = newline.join(ratio_text(r) for r in row.ratios)
    verdicts = newline.join(r.verdict for r in row.ratios if r.verdict)
    return row.group, row.case, row.variant, duration(row.seconds), rate(row), share, ratios, verdicts


def summary(results: Results) -> str:
    """What was measured on, in one line."""
    e, c = results.environment, results.ceilings
    versions = [f"torch {e['torch']}", f"triton {e['triton']}", f"python {e['python']}"]
    if e["driver"]:
        versions = [f"driver {e['driver']}", f"CUDA {e['cuda']}", *versions]
    return (
        f"{e['device']}, {e['threads']} threads, {', '.join(versions)}, commit {e['commit']}, {e['date']}; "
        f"ceilings: device copy {c['bytes_s'] / 1e9:.3g} GB/s, matrix product {c['flops_s'] / 1e12:.3g} TFLOP/s"
    )


def rich_table(results: Results) -> Table:
    """For a terminal."""
    table = Table(title=summary(results), title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in ("median", "of ceiling") else "left", overflow="fold")
    previous = None
    for row in results.rows:
        if previous not in (None, row.group):
            table.add_section()
        previous = row.group
        table.add_row(*cells(row, newline="\n"))
    return table


def markdown_table(results: Results) -> str:
    """For a README or a pull request."""
    lines = [f"{summary(results)}.", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cells(row, newline='<br>'))} |" for row in results.rows]
    return "\n".join(lines) + "\n"

"""Compare two results of the suite and flag what became slower.

    python bench/compare.py bench/results/A.json B.json

A is the older, B the newer. Ratios are compared always; absolute times only where both name the same device. Exits 1 if
anything is worse by more than --tolerance or missing from B, 0 if nothing is, 2 for files that are not results.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from rich.console import Console
from rich.table import Table

from bench.results import Results, Row, duration
from fastdiff.cli import run_command
from fastdiff.errors import UserError


@dataclass(frozen=True)
class Change:
    """One number in both files. worse is by what share B is worse than A: 0.1 is 10% worse, below 0 is better."""

    key: tuple[str, str, str]
    what: str
    before: str
    after: str
    worse: float


def _changes(a: Row, b: Row, *, times: bool) -> list[Change]:
    changes = []
    if times:
        worse = b.seconds / a.seconds - 1
        changes.append(Change(a.key, "median time", duration(a.seconds), duration(b.seconds), worse))
    newer = {r.against: r for r in b.ratios}
    for before in a.ratios:
        after = newer.get(before.against)
        if after is None or after.better != before.better:
            continue
        worse = (after.value / before.value if before.better == "lower" else before.value / after.value) - 1
        what = f"{'speed' if before.better == 'higher' else 'time'} against {before.against}"
        changes.append(Change(a.key, what, f"{before.value:.3g}", f"{after.value:.3g}", worse))
    return changes


def missing(a: Results, b: Results) -> list[str]:
    """Rows and ratios of A that B does not have, or has in the other direction."""
    newer = {row.key: row for row in b.rows}
    gone = []
    for row in a.rows:
        if row.key not in newer:
            gone.append(" ".join(row.key))
            continue
        there = {(r.against, r.better) for r in newer[row.key].ratios}
        gone += [f"{' '.join(row.key)} against {r.against}" for r in row.ratios if (r.against, r.better) not in there]
    return gone


def differences(a: Results, b: Results) -> list[str]:
    """What differs between the two environments, commit and date aside, as `name: A -> B`."""
    names = [n for n in {**a.environment, **b.environment} if n not in ("commit", "date")]
    return [
        f"{n}: {a.environment.get(n)} -> {b.environment.get(n)}"
        for n in names
        if a.environment.get(n) != b.environment.get(n)
    ]


def compare(a: Results, b: Results) -> list[Change]:
    """Every ratio that both have; on the same device the times too. Raises UserError if they share no row."""
    newer = {row.key: row for row in b.rows}
    shared = [row for row in a.rows if row.key in newer]
    if not shared:
        raise UserError("the two results have no benchmark in common; compare two of the same kind of device.")
    same = all(a.environment.get(n) == b.environment.get(n) for n in ("device", "threads"))
    return [change for row in shared for change in _changes(row, newer[row.key], times=same)]


def main(
    a: Annotated[Path, tyro.conf.Positional],
    b: Annotated[Path, tyro.conf.Positional],
    /,
    tolerance: float = 0.05,
) -> int:
    """Compare two results of `pytest bench`; exits 1 if anything became slower or is missing.

    Args:
        a: the older JSON file.
        b: the newer JSON file.
        tolerance: how much worse a number may be, as a share: 0.05 is 5%.
    """
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    try:
        if not 0 <= tolerance < float("inf"):
            raise UserError(f"--tolerance is {tolerance}, but must be a share of at least 0, such as 0.05.")
        older, newer = Results.read(a), Results.read(b)
        changes = compare(older, newer)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for line in differences(older, newer) or ["the same environment"]:
        console.print(line, markup=False)
    console.print(f"commit: {older.environment.get('commit')} -> {newer.environment.get('commit')}", markup=False)
    if not any(c.what == "median time" for c in changes):
        console.print("not the same device and threads: only ratios are compared")
    gone = missing(older, newer)
    for name, what in (("missing from B", gone), ("only in B", missing(newer, older))):
        if what:
            console.print(f"{name}: {'; '.join(what)}", markup=False)
    flagged = [c for c in changes if c.worse > tolerance]
    moved = sorted((c for c in changes if abs(c.worse) > tolerance), key=lambda c: -c.worse)
    if moved:
        table = Table()
        for column in ("benchmark", "number", "A", "B", "change"):
            table.add_column(column, overflow="fold")
        for c in moved:
            style = "red" if c.worse > tolerance else "green"
            word = f"{c.worse:.1%} worse" if c.worse > 0 else f"{-c.worse:.1%} better"
            table.add_row(" / ".join(c.key), c.what, c.before, c.after, word, style=style)
        console.print(table)
    console.print(f"{len(flagged)} of {len(changes)} numbers worse by more than {tolerance:.1%}")
    return 1 if flagged or gone else 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main)))

"""The table of tests/README.md: `python tests/reliability/table.py`.

`python -m pytest tests/reliability --slow` records one row for each promise. The seconds, which differ from run to run,
stay in the record.
"""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent.parent / "bench" / "results" / "reliability.json"


def read() -> dict[str, dict]:
    """promise -> {"count", "failures", "seconds", "unit"}, as recorded."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def record(promise: str, row: dict) -> None:
    """Add or replace a promise's row."""
    rows = {**read(), promise: row}
    RESULTS.write_text(json.dumps(dict(sorted(rows.items())), indent=2) + "\n")


def markdown(rows: dict[str, dict]) -> str:
    """The rows as a Markdown table."""
    lines = ["| promise | cases | failures |", "|---|---:|---:|"]
    for promise, row in rows.items():
        lines.append(f"| {promise} | {row['count']:,} {row['unit']} | {row['failures']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(read()))

"""Print results of the suite as a Markdown table.

python bench/table.py bench/results/cpu-amd-epyc-2c.json
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from bench.results import Results, markdown_table
from fastdiff.cli import run_command
from fastdiff.errors import UserError


def main(results: Annotated[Path, tyro.conf.Positional], /) -> int:
    """Print results of `pytest bench` as a Markdown table.

    Args:
        results: a JSON file of bench/results.
    """
    try:
        print(markdown_table(Results.read(results)), end="")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main)))

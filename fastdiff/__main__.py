import sys

from fastdiff.cli import main, run_command


def run() -> int:
    """The command `fastdiff` of an installed fastdiff."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(run())

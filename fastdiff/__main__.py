import sys

from fastdiff.cli import main, run_command

sys.exit(run_command(main))

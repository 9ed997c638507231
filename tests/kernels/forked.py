"""Run pytest on several copies of the repository, each in a process of its own, in Triton's interpreter.

    TRITON_INTERPRET=1 python forked.py COPY SELECTION [COPY SELECTION ...]

The slow imports happen once, before the forks; two copies run at a time. A copy's output goes to COPY/output.txt, its
exit status to COPY/status.txt.
"""

import os
import sys
from pathlib import Path

import hypothesis  # noqa: F401
import pytest
import torch._dynamo  # noqa: F401
import triton.language  # noqa: F401


def run(copy: Path, selection: str) -> None:
    os.chdir(copy)
    out = os.open("output.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    tests = ["tests/kernels/test_contract.py", "-k", f"values_and_gradients and {selection}"]
    status = pytest.main(["-q", "-x", "-m", "not gpu", "--tb=short", "-rN", *tests])
    Path("status.txt").write_text(str(int(status)))


def main(arguments: list[str]) -> None:
    running = 0
    for copy, selection in zip(arguments[::2], arguments[1::2], strict=True):
        if running == 2:
            os.wait()
            running -= 1
        if os.fork() == 0:
            try:
                run(Path(copy), selection)
            finally:
                os._exit(0)
        running += 1
    for _ in range(running):
        os.wait()


if __name__ == "__main__":
    main(sys.argv[1:])

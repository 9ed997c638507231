"""`train_cifar.py` with a fault in one rank.

    torchrun ... faulty.py '{"rank": 1, "place": "forward", "call": 3, "way": "kill"}' --any-config-field VALUE ...

call   of the function that stands for the place, counted from 1
way    kill (SIGKILL), raise (RuntimeError), exit (os._exit), hang (sleep), stop (SIGSTOP), term (SIGTERM, and go on)
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PLACES = ("data", "forward", "all-reduce", "save", "evaluation")


def fail(way: str, mark: str | None = None) -> None:
    """Do the harm, and write the time.monotonic() of it to the file `mark`."""
    if mark is not None:
        Path(mark).write_text(str(time.monotonic()))
    if way == "raise":
        raise RuntimeError("an injected fault")
    if way == "exit":
        os._exit(7)
    while way == "hang":
        time.sleep(1000)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[way])


def inject(fault: dict) -> None:
    """Make the function that stands for the place fail at that call, if this is the rank."""
    import torch.distributed as dist

    from fastdiff.data.loaders import Loader
    from fastdiff.nets.unet import UNet
    from fastdiff.runs import checkpoint

    owner, name = {
        "data": (Loader, "__next__"),
        "forward": (UNet, "forward"),
        "all-reduce": (dist, "all_reduce"),
        "save": (checkpoint, "_manifest_sha256"),
        "evaluation": (UNet, "forward"),
    }[fault["place"]]
    if int(os.environ["RANK"]) != fault["rank"]:
        return
    real: Callable = getattr(owner, name)
    calls = 0

    def call(*arguments, **options):
        nonlocal calls
        if owner is not UNet or arguments[0].training == (fault["place"] == "forward"):
            calls += 1
            if calls == fault["call"]:
                fail(fault["way"], fault.get("mark"))
        return real(*arguments, **options)

    setattr(owner, name, call)


def main(arguments: list[str]) -> int:
    """Inject the fault, if there is one, and run the entry point."""
    import train_cifar
    from fastdiff.cli import run_command

    fault, *flags = arguments
    if json.loads(fault):
        inject(json.loads(fault))
    sys.argv = ["train_cifar.py", *flags]
    return run_command(train_cifar.main)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

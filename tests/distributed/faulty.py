"""`train_cifar.py` with a fault in one rank.

    torchrun ... faulty.py '{"rank": 1, "place": "forward", "call": 3, "way": "kill"}' --any-config-field VALUE ...

call   of the function that stands for the place, counted from 1
way    kill (SIGKILL), raise (RuntimeError), exit (os._exit), hang (sleep), term (SIGTERM, and go on)
mark   a file that gets the time.monotonic() of the fault; MARK-0 and MARK-1 get the ranks' process ids
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def fail(way: str) -> None:
    """Do the harm."""
    if way == "raise":
        raise RuntimeError("an injected fault")
    if way == "exit":
        os._exit(7)
    while way == "hang":
        time.sleep(1000)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[way])


def inject(fault: dict) -> None:
    """Make the function that stands for the place fail at that call, if this is the rank."""
    import torch.distributed as dist

    from fastdiff.data.loaders import Loader
    from fastdiff.nets.unet import UNet
    from fastdiff.runs import checkpoint
    from fastdiff.runs.run import Run

    owner, name = {
        "data": (Loader, "__next__"),
        "forward": (UNet, "forward"),
        "all-reduce": (dist, "all_reduce"),
        "save": (checkpoint, "_manifest_sha256"),
        "evaluation": (UNet, "forward"),
        "before evaluation": (Run, "sync"),  # each evaluation follows a save, which begins with it
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
                if "mark" in fault:
                    Path(fault["mark"]).write_text(str(time.monotonic()))
                fail(fault["way"])
        return real(*arguments, **options)

    setattr(owner, name, call)


def main(fault: str, *flags: str) -> int:
    """Inject the fault, and run the entry point."""
    import train_cifar

    given = json.loads(fault)
    Path(f"{given['mark']}-{os.environ['RANK']}").write_text(str(os.getpid()))
    inject(given)
    sys.argv = ["train_cifar.py", *flags]
    return train_cifar.run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

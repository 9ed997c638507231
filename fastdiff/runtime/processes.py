"""What the watch asks of the operating system and of Python's threads."""

import os
import signal
import socket
from contextlib import suppress
from types import FrameType


def listen(address: str, backlog: int) -> socket.socket:
    """Within a host on its loopback; else on all networks, as a host may know its own name as that of its loopback."""
    if address == "127.0.0.1":
        return socket.create_server((address, 0), backlog=backlog)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=both)


def kill_all(processes: list[tuple[str, int]]) -> None:
    """Kill those of this host that do not answer: torchrun would wait 30 s for them."""
    for host, pid in processes:
        if host == socket.gethostname() and pid != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def where(frame: FrameType | None) -> str:
    """The innermost function of this repository that a thread is in, as `step.py:120 in _body`."""
    innermost = frame
    while frame is not None and not _ours(frame.f_code.co_filename):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return ""
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _ours(file: str) -> bool:
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    in_repository = file.startswith(os.path.dirname(package) + os.sep) and "-packages" not in file
    return in_repository or file.startswith(package + os.sep)

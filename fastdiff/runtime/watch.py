"""Watch over the ranks of a run: when one dies, fails or hangs, all end within seconds, and the cause is named once.

A collective waits for every rank. When one is gone, gloo notices the closed connection and NCCL may not; when one
hangs, neither does. So every rank has a thread with a connection to a hub in rank 0, and reports there what its main
thread is at. The hub finds that a rank has

    died      its connection ended without a goodbye: the kernel closes it, whatever ended the process;
    failed    it said so;
    hung      no progress for `timeout` seconds though it waits for no other rank, or no report for as long; or all of
              them wait for each other.

It prints one line about it and tells the others; all leave by os._exit, as a main thread may sit in a collective that
never ends. A signal that one rank gets is passed on to all. Messages are JSON, one a line.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastdiff.errors import UserError
from fastdiff.runtime import output
from fastdiff.runtime.processes import kill_all, listen, where
from fastdiff.runtime.signals import StopRequest

INTERVAL = 0.5  # seconds between two reports of a rank
GATHER = 0.2  # seconds to wait for other ranks' failures and deaths, of which one may be the cause
JOIN = 60.0  # seconds in which all ranks must have reached the hub
LONGEST = 2**16  # bytes of a message
SAVING_THREAD = "checkpoint"  # how the names of the threads begin that write checkpoints


class _Connection:
    """Messages over a socket; `send` may be called from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._lock, self._rest = sock, threading.Lock(), b""
        sock.settimeout(1.0)  # a stopped process does not read: its sender must not wait for it
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> bool:
        """False if the other end is gone or does not read."""
        try:
            with self._lock:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
            return True
        except OSError:
            return False

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come, waiting for at most a second; None at the end of the connection."""
        try:
            data = self._socket.recv(LONGEST)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > LONGEST:
            return None
        try:
            return [json.loads(line) for line in lines]
        except ValueError:  # no rank of ours
            return None

    def close(self) -> None:
        self._socket.close()


@dataclass
class _Rank:
    """What the hub knows of a rank.

    pid, host     of its process
    place, frame  what its main thread was at, and where in the code
    idle          seconds since its main thread came there; None while that is not judged
    waiting       whether it waits there for other ranks
    heard         time.monotonic() of its last report
    ended         its connection has ended
    left          it said goodbye before
    """

    connection: _Connection
    pid: int
    host: str
    heard: float
    place: str = "the start"
    frame: str = ""
    idle: float | None = None
    waiting: bool = False
    ended: bool = False
    left: bool = False

    def take(self, message: dict[str, Any]) -> None:
        self.place, self.frame, self.idle, self.waiting = (message[k] for k in ("place", "frame", "idle", "waiting"))

    def stuck(self, now: float) -> float:
        """For how many seconds it has made no progress, as far as that is judged, or has not reported."""
        return 0.0 if self.left else (self.idle or 0.0) + now - self.heard

    def __str__(self) -> str:
        return f"{self.place}{f' ({self.frame})' if self.frame else ''}"


class _Hub(threading.Thread):
    """The judge, in rank 0."""

    def __init__(self, listener: socket.socket, size: int, *, token: str, timeout: float) -> None:
        super().__init__(name="hub", daemon=True)
        self.listener, self.size, self.token, self.timeout = listener, size, token, timeout
        self.ranks: dict[int, _Rank] = {}
        self.failed: dict[int, tuple[str, int]] = {}  # rank -> what it said, and its exit code
        self.failed_at: float | None = None
        self.signal = 0

    def run(self) -> None:
        try:
            if self._admit():
                self._watch()
        except Exception:
            traceback.print_exc()
            os._exit(1)

    def _admit(self) -> bool:
        """Accept every rank, and welcome them when all are there."""
        self.listener.settimeout(JOIN)
        while len(self.ranks) < self.size:
            try:
                connection = _Connection(self.listener.accept()[0])
            except TimeoutError:
                return False  # no welcome comes, of which every rank complains
            for hello in connection.receive() or []:
                if not isinstance(hello, dict) or hello.get("token") != self.token:  # a stranger: a port scanner
                    connection.close()
                else:
                    rank = _Rank(connection, hello["pid"], hello["host"], time.monotonic())
                    self.ranks[hello["rank"]] = rank
        self.listener.close()
        self._tell({"welcome": os.getpid(), "host": socket.gethostname()})
        return True

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for rank in self.ranks.values():
            selector.register(rank.connection, selectors.EVENT_READ, rank)
        told = 0.0
        while not all(rank.left or rank.ended for rank in self.ranks.values()):
            for key, _ in selector.select(INTERVAL if self.failed_at is None else GATHER / 4):
                messages = key.data.connection.receive()
                if messages is None:
                    selector.unregister(key.data.connection)
                    key.data.ended = True
                for message in messages or []:
                    self._take(key.data, message)
            now = time.monotonic()
            self._judge(now)
            if now - told >= INTERVAL:
                told = now
                self._tell({"hub": str(self.ranks[0])})
        for rank in self.ranks.values():
            rank.connection.send({"goodbye": True})

    def _take(self, rank: _Rank, message: dict[str, Any]) -> None:
        rank.heard = time.monotonic()
        if "place" in message:
            rank.take(message)
        if "goodbye" in message:
            rank.left = True
        if "failed" in message:
            number = next(n for n, each in self.ranks.items() if each is rank)
            self.failed[number] = message["failed"], message["code"]
            self.failed_at = self.failed_at or rank.heard
        if message.get("signal") and not self.signal:
            self.signal = message["signal"]
            self._tell({"signal": self.signal})

    def _judge(self, now: float) -> None:
        died = {number: rank for number, rank in self.ranks.items() if rank.ended and not rank.left}
        if died:  # a failure may be what others made of it: they lost a connection
            causes = (f"rank {n} (pid {r.pid} on {r.host}) has died, last seen in {r}" for n, r in died.items())
            self._end("; ".join(causes), 1)
        if self.failed_at is not None and now - self.failed_at > GATHER:
            self._end(*self.failed[min(self.failed)])
        if all(rank.idle is None for rank in self.ranks.values()):
            return
        stuck = {number: rank.stuck(now) for number, rank in self.ranks.items()}
        hung = {n for n, seconds in stuck.items() if seconds > self.timeout}
        active = {n for n, rank in self.ranks.items() if not rank.left}
        silent = {n for n in active if now - self.ranks[n].heard > self.timeout}
        guilty = {n for n in hung if n in silent or not self.ranks[n].waiting}
        if not guilty and hung == set(stuck):
            guilty = hung
        if guilty:
            ordered = sorted(active, key=lambda n: (n not in guilty, -stuck[n]))
            states = (
                f"rank {n} {'has hung' if n in guilty else 'waits'} for {stuck[n]:.0f} s in {self.ranks[n]}"
                + (" and does not answer" if n in silent else "")
                for n in ordered
            )
            kill = [(self.ranks[n].host, self.ranks[n].pid) for n in silent]
            self._end(f"{'; '.join(states)} (--rank-timeout {self.timeout:g})", 1, kill)

    def _end(self, cause: str, code: int, kill: list[tuple[str, int]] | None = None) -> None:
        """Name the cause, have all others leave, and leave; those that do not answer are killed on their hosts."""
        _say(cause)
        self._tell({"end": code, "kill": kill})
        kill_all(kill or [])
        deadline = time.monotonic() + 2
        others = [rank for number, rank in self.ranks.items() if number != 0]
        # Not before they have read it: what a closed connection still holds may be lost.
        while time.monotonic() < deadline and not all(rank.ended for rank in others):
            for rank in others:
                rank.ended = rank.ended or rank.connection.receive() is None
        os._exit(code)

    def _tell(self, message: dict[str, Any]) -> None:
        for number, rank in self.ranks.items():
            if not (rank.left or rank.ended) and not (number == 0 and "end" in message):
                rank.connection.send(message)


class Watch:
    """This rank's part: reports to the hub, and ends this process when the hub says so or is gone.

    Args:
        rank, size: this process among all.
        address: where rank 0's host is reached; on 127.0.0.1 it listens there alone.
        share: gives every rank the value that rank 0 calls it with; called once.
        timeout: seconds without progress after which a rank has hung.

    Attributes:
        judged: whether lack of progress counts; False at first, as start-ups take long and have limits of their own.
        stop: takes signals that other ranks got, and gives its own to them.

    Raises:
        UserError: not all ranks have come within JOIN seconds.
    """

    def __init__(self, rank: int, size: int, *, address: str, share: Callable[[Any], Any], timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self.judged = False
        self.stop: StopRequest | None = None
        self._place, self._since, self._waiting = "the start", time.monotonic(), False
        self._main = threading.get_ident()
        self._hub_place = "the start"
        listener = listen(address, size) if rank == 0 else None
        port, token = share((listener.getsockname()[1], secrets.token_hex(16)) if listener is not None else None)
        self._hub = _Hub(listener, size, token=token, timeout=timeout) if listener is not None else None
        if self._hub is not None:
            self._hub.start()
        problem = f"rank {rank} cannot reach rank 0 at {address}, port {port}: allow TCP connections between the hosts"
        try:
            self._connection = _Connection(socket.create_connection((address, port), timeout=JOIN))
        except OSError as error:
            raise UserError(f"{problem} ({error}).") from error
        self._connection.send({"token": token, "rank": rank, "pid": os.getpid(), "host": socket.gethostname()})
        self._hub_process = self._welcome(problem)
        self._parent = os.getppid()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def _welcome(self, problem: str) -> tuple[str, int]:
        """Host and pid of the hub, which it tells when all are there."""
        deadline = time.monotonic() + JOIN
        while time.monotonic() < deadline:
            messages = self._connection.receive()
            if messages is None:
                break
            if messages:
                return messages[0]["host"], messages[0]["welcome"]
        raise UserError(f"{problem}, or some rank has not come within {JOIN:g} s.")

    def at(self, place: str) -> None:
        """Progress: the main thread begins something, which the text names."""
        self._place, self._since = place, time.monotonic()

    @contextmanager
    def waiting(self, what: str) -> Generator[None]:
        """The main thread waits for other ranks meanwhile, which is their fault if it takes long."""
        place = self._place
        self.at(f"{what} of {place}")
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
            self.at(place)

    @property
    def place(self) -> str:
        """What the main thread is at."""
        return self._place

    def fail(self, cause: str, code: int) -> None:
        """Have all ranks end; the hub names the cause, or one that explains it. Does not return."""
        if self._connection.send({"failed": cause, "code": code}):
            time.sleep(GATHER + 3)  # the thread leaves as soon as the hub has decided
        self._leave(code, cause)

    def close(self) -> None:
        """The end of a run without failure; what happens to other ranks afterwards is not this one's business."""
        self._closing.set()
        self._connection.send({"goodbye": True})
        self._thread.join()
        if self._hub is not None:
            self._hub.join()

    def _run(self) -> None:
        try:
            self._loop()
        except Exception:
            traceback.print_exc()
            os._exit(1)

    def _loop(self) -> None:
        heard, reported = time.monotonic(), 0.0
        selector = selectors.DefaultSelector()
        selector.register(self._connection, selectors.EVENT_READ)
        while True:
            messages: list[dict[str, Any]] | None = []
            if selector.select(INTERVAL / 2):
                messages = self._connection.receive()
                heard = time.monotonic()
            now = time.monotonic()
            if messages is None:
                if self._closing.is_set():
                    return
                self._leave(1, f"rank 0 has died, last seen in {self._hub_place}; rank {self.rank} is in {self._place}")
            for message in messages or []:
                if "goodbye" in message:
                    return
                if "end" in message:
                    kill_all(message["kill"] or [])
                    self._leave(message["end"])
                if "signal" in message and self.stop is not None and self.stop.signal is None:
                    self.stop.signal = signal.Signals(message["signal"])
                self._hub_place = message.get("hub", self._hub_place)
            if self.judged and now - heard > self.timeout + 2 * INTERVAL:
                host, pid = self._hub_process
                kill_all([(host, pid)])
                self._leave(1, f"rank 0 has hung in {self._hub_place} and does not answer for {now - heard:.0f} s")
            if os.getppid() != self._parent and "TORCHELASTIC_RUN_ID" in os.environ:
                self._leave(1, "torchrun is gone")
            got = self.stop.signal if self.stop is not None else None
            if now - reported >= INTERVAL and not self._closing.is_set():
                reported = now
                self._connection.send(self._report(now) | {"signal": int(got or 0)})

    def _report(self, now: float) -> dict[str, Any]:
        frames = sys._current_frames()
        frame = where(frames.get(self._main))
        for thread in threading.enumerate():
            if frame.startswith("async_save.py:") and thread.name.startswith(
                SAVING_THREAD
            ):  # for which the main one waits
                frame = f"{frame}, for {where(frames.get(thread.ident or 0))}"
                break
        return {
            "place": self._place,
            "frame": frame,
            "idle": now - self._since if self.judged else None,
            # A rank that waits is within the call of the collective, whose last function of ours is in world.py.
            "waiting": self._waiting and frame.startswith("world.py:"),
        }

    def _leave(self, code: int, cause: str | None = None) -> None:
        if cause is not None:
            _say(cause)
        if os.isatty(1):
            output.write(1, "\x1b[?25h\n")  # the live line hid the cursor
        os._exit(code)


def _say(cause: str) -> None:
    output.write(2, f"error: {cause}\n")  # not by print: the main thread may hang within one

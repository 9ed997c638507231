"""Downloads from a server that fails in every way; each ends in bounded time, and only the right file appears."""

import hashlib
import http.server
import threading
import time

import numpy as np
import pytest

from fastdiff.data import download
from tests.reliability import jobs
from tests.reliability.conftest import counts

BODY = np.random.default_rng(0).bytes(3 * download.BLOCK_BYTES + 1000)
DIGEST = hashlib.sha256(BODY).hexdigest()
SIZE = len(BODY)
STALL, DEADLINE = 0.3, 1.0


class Server(http.server.ThreadingHTTPServer):
    """Answers by the method that `fault` names, and counts requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.at, self.requests, self.closing = "whole", 0, 0, threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests += 1
        getattr(self, self.server.fault)(self.server.at)

    def send(self, body, length=SIZE, kind="application/octet-stream"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def whole(self, at):
        self.send(BODY)

    def truncated(self, at):
        self.send(BODY[:at])
        self.connection.close()

    def truncated_without_a_length(self, at):
        self.send(BODY[:at], length=None)

    def flipped(self, at):
        self.send(BODY[:at] + bytes([BODY[at] ^ 1]) + BODY[at + 1 :])

    def html(self, at):
        page = b"<html>please log in</html>" * (at % 100 + 1)
        self.send(page, len(page), "text/html")

    def endless(self, at):
        self.send(BODY, length=None)
        while not self.server.closing.is_set():
            try:
                self.wfile.write(BODY)
            except OSError:
                return

    def stalled(self, at):
        self.send(BODY[:at])
        self.server.closing.wait(30)

    def trickling(self, at):
        """Just fast enough for every block, but for hours."""
        self.send(b"", length=None)
        while not self.server.closing.wait(0.05):
            try:
                self.wfile.write(bytes(download.BLOCK_BYTES // 4))
            except OSError:
                return

    def offline(self, at):
        raise AssertionError("no one listens there")


FAULTS = ("truncated", "truncated_without_a_length", "flipped", "html", "endless", "stalled", "trickling", "offline")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "STALL_SECONDS", STALL)
    monkeypatch.setattr(download, "DEADLINE_SECONDS", DEADLINE)
    server = Server()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@counts(fast=8, slow=80)
def test_no_bad_data_is_accepted(tmp_path, server, promise, count):
    with promise("Downloads: 0 bad files accepted, in bounded time, and the next try succeeds", "faults") as p:
        for index in range(count):
            fault = server.fault = FAULTS[index % len(FAULTS)]
            server.at = jobs.random_source("download", index).randrange(len(BODY))
            path = tmp_path / str(index) / "file"
            size = len(BODY) if fault != "trickling" else 2**40
            with p.case(f"{fault} at {server.at}"):
                began = time.monotonic()
                url = server.url if fault != "offline" else "http://127.0.0.1:9/file"
                with pytest.raises((OSError, ValueError)):
                    download.fetch(url, path, algorithm="sha256", digest=DIGEST, size=size)
                assert time.monotonic() - began < DEADLINE + STALL + 5
                assert list(path.parent.iterdir()) == []
                server.fault = "whole"
                (path.parent / "file.part").write_bytes(b"of a process that was killed")
                download.fetch(server.url, path, algorithm="sha256", digest=DIGEST, size=len(BODY))
                assert path.read_bytes() == BODY
                assert list(path.parent.iterdir()) == [path]


def test_several_processes_fetch_once(tmp_path, server):
    barrier, path = jobs._context.Barrier(4), tmp_path / "data" / "file"
    processes = [
        jobs.start(jobs.fetch, server.url, path, DIGEST, len(BODY), barrier, log=tmp_path / "log") for _ in range(4)
    ]
    assert [jobs.finish(process) for process in processes] == [0] * 4, (tmp_path / "log").read_text()
    assert server.requests == 1
    assert path.read_bytes() == BODY
    assert list(path.parent.iterdir()) == [path]

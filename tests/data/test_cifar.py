"""CIFAR-10's files: found, checked, downloaded from a local server in every state of health."""

import hashlib
import os
import pickle
import socket
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from fastdiff.data import cifar, download
from fastdiff.data.cifar import load_cifar10

N = 20  # images in a batch file, instead of 10,000


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A small CIFAR-10 in the original format, whose checksums take the place of the true ones; its archive."""
    folder = tmp_path / "official" / cifar.FOLDER
    folder.mkdir(parents=True)
    md5s = {split: {} for split in cifar.BATCHES}
    for split, names in cifar.BATCHES.items():
        for name in names:
            rng = np.random.default_rng(len(name) + ord(name[-1]))
            batch = {"data": rng.integers(0, 256, (N, 3072), dtype=np.uint8), "labels": rng.integers(0, 10, N).tolist()}
            content = pickle.dumps(batch, protocol=3)
            (folder / name).write_bytes(content)
            md5s[split][name] = hashlib.md5(content).hexdigest()
    archive = folder.parent / cifar.ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, cifar.FOLDER)
    monkeypatch.setattr(cifar, "BATCHES", md5s)
    monkeypatch.setattr(cifar, "ARCHIVE_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, "URL", "http://127.0.0.1:9/no-test-reaches-the-network")
    monkeypatch.setenv("no_proxy", "*")
    return archive


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    return root


def put_folder(official, root):
    (official.parent / cifar.FOLDER).rename(root / cifar.FOLDER)


def check(official_folder, images, labels, split):
    """The images and labels are those in the files, in their order, channels last."""
    names = sorted(cifar.BATCHES[split])
    batches = [pickle.loads((official_folder / name).read_bytes()) for name in names]
    assert images.shape == (N * len(names), 32, 32, 3)
    assert images.flags.c_contiguous
    assert labels.dtype == np.int64
    for i, batch in enumerate(batches):
        np.testing.assert_array_equal(labels[i * N : (i + 1) * N], batch["labels"])
        for channel in range(3):
            plane = batch["data"][:, 1024 * channel : 1024 * (channel + 1)].reshape(N, 32, 32)
            np.testing.assert_array_equal(images[i * N : (i + 1) * N, :, :, channel], plane)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_extracted_folder(official, root, split):
    put_folder(official, root)
    check(root / cifar.FOLDER, *load_cifar10(root, split), split)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_archive_is_read_in_place(official, root, split):
    os.link(official, root / cifar.ARCHIVE)
    check(official.parent / cifar.FOLDER, *load_cifar10(root, split), split)
    assert os.listdir(root) == [cifar.ARCHIVE]


def test_a_truncated_batch(official, root, user_error):
    put_folder(official, root)
    batch = root / cifar.FOLDER / "data_batch_1"
    batch.write_bytes(batch.read_bytes()[:-1000])
    user_error(lambda: load_cifar10(root, "train"), batch, "truncated", "copy it again")
    load_cifar10(root, "test")


def test_a_missing_batch(official, root, user_error):
    put_folder(official, root)
    (root / cifar.FOLDER / "data_batch_3").unlink()
    user_error(lambda: load_cifar10(root, "train"), root / cifar.FOLDER / "data_batch_3", "remove")


@pytest.mark.parametrize("part", [0, 0.5, 0.999])
def test_a_truncated_archive(official, root, part, user_error):
    archive = root / cifar.ARCHIVE
    archive.write_bytes(official.read_bytes()[: int(official.stat().st_size * part)])
    user_error(lambda: load_cifar10(root, "train"), archive, "MD5", "remove it")


def test_an_archive_without_the_batches(official, root, monkeypatch, user_error):
    with tarfile.open(root / cifar.ARCHIVE, "w:gz") as tar:
        tar.add(official.parent / cifar.FOLDER / "test_batch", f"{cifar.FOLDER}/test_batch")
    monkeypatch.setattr(cifar, "ARCHIVE_MD5", hashlib.md5((root / cifar.ARCHIVE).read_bytes()).hexdigest())
    user_error(lambda: load_cifar10(root, "train"), root / cifar.ARCHIVE, "data_batch_1")


class Danger:
    def __reduce__(self):
        return os.mkdir, ("danger",)


@pytest.mark.parametrize("content", [Danger(), {"data": Danger()}, np.array([Danger()], dtype=object), print, eval])
def test_the_unpickler_calls_nothing(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="no CIFAR-10 batch does"):
        cifar._unpickle(pickle.dumps(content, protocol=3))
    assert not list(tmp_path.iterdir())


def test_python_2_strings_are_read():
    """The true files were pickled by Python 2, with str where we have bytes."""
    content = b"(dp0\nS'data'\np1\nS'\\xff'\np2\nsS'labels'\np3\n(lp4\nI6\nas."
    assert cifar._unpickle(content) == {"data": "\xff", "labels": [6]}


@pytest.fixture
def serve(monkeypatch):
    """serve(handler): serve it on a free local port and let the download's URL point there."""
    servers = []

    def serve(handler, path="/"):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(cifar, "URL", f"http://127.0.0.1:{server.server_port}{path}")

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_download(official, root, serve, capfd):
    serve(partial(Quiet, directory=official.parent), f"/{cifar.ARCHIVE}")
    check(official.parent / cifar.FOLDER, *load_cifar10(root / "new", "train"), "train")
    assert os.listdir(root / "new") == [cifar.ARCHIVE]
    out, err = capfd.readouterr()
    assert out == ""
    assert f"downloading {cifar.URL}" in err


def respond(status=200, length=None, body=b"", hang=False):
    """A handler that answers so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
            if hang:
                threading.Event().wait(5)

        def log_message(self, *args):
            pass

    return Handler


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 404},
        {"status": 500},
        {"body": b"<html>a login page</html>"},
        {"body": b"the beginning", "length": 170_498_071},
        {"body": b"the beginning", "length": 170_498_071, "hang": True},
        {"length": 170_498_071, "hang": True},
    ],
    ids=["404", "500", "wrong MD5", "truncated", "stalled", "silent"],
)
def test_a_download_that_fails(official, root, serve, answer, monkeypatch, user_error):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
    serve(respond(**answer))
    user_error(lambda: load_cifar10(root, "train"), cifar.URL, root / cifar.ARCHIVE, "--data digits")
    assert not list(root.iterdir())


def test_a_server_that_refuses_or_never_answers(official, root, monkeypatch, user_error):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # accepts, and says nothing
        monkeypatch.setattr(cifar, "URL", f"http://127.0.0.1:{listening.getsockname()[1]}/")
        user_error(lambda: load_cifar10(root, "train"), cifar.URL, "did not answer", "by hand")
    user_error(lambda: load_cifar10(root, "train"), cifar.URL, "refused", "by hand")
    assert not list(root.iterdir())


def test_an_interrupted_download_leaves_nothing(official, root, monkeypatch):
    def interrupted(url, deadline):
        yield b"the beginning"
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_cifar10(root, "train")
    assert not list(root.iterdir())


def test_a_root_that_is_a_file(official, tmp_path, user_error):
    (tmp_path / "file").touch()
    user_error(lambda: load_cifar10(tmp_path / "file", "train"), tmp_path / "file", "by hand")


def test_the_true_checksums_are_torchvision_s():
    from torchvision.datasets import CIFAR10

    assert CIFAR10.tgz_md5 == cifar.ARCHIVE_MD5
    assert (CIFAR10.url, CIFAR10.filename, CIFAR10.base_folder) == (cifar.URL, cifar.ARCHIVE, cifar.FOLDER)
    assert cifar.BATCHES["train"] == {name: md5 for name, md5 in CIFAR10.train_list}  # noqa: C416
    assert cifar.BATCHES["test"] == {name: md5 for name, md5 in CIFAR10.test_list}  # noqa: C416

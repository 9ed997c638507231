"""Files made to run code, or to fill the memory: none is obeyed."""

import hashlib
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from fastdiff.data import cifar
from fastdiff.data.cache import Decoded, cached, cached_arrays
from fastdiff.data.datasets import load_dataset
from fastdiff.data.files import open_files
from fastdiff.errors import UserError
from fastdiff.runs import checkpoint
from tests.reliability import jobs


class Calls:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def malicious(marker) -> list[bytes]:
    """Ten pickles that create the file `marker` when a plain unpickler loads them."""
    import os
    import subprocess

    touch = f"open({str(marker)!r}, 'w').close()"
    command = f"touch {marker}"
    nested = io.BytesIO()
    torch.save({"state": {0: Calls(exec, touch)}}, nested)
    return [
        pickle.dumps(Calls(exec, touch)),
        pickle.dumps(Calls(eval, f"open({str(marker)!r}, 'w')")),
        pickle.dumps(Calls(os.system, command), protocol=0),
        pickle.dumps(Calls(subprocess.call, ["touch", str(marker)])),
        pickle.dumps(Calls(open, str(marker), "w"), protocol=2),
        pickle.dumps({"data": np.array([Calls(exec, touch)], dtype=object), "labels": [0]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": Calls(exec, touch)}, protocol=4),
        f"cos\nsystem\n(S'{command}'\ntR.".encode(),
        f"(S'{command}'\nios\nsystem\n.".encode(),
        nested.getvalue(),
    ]


def as_optimizer(tmp_path, content, monkeypatch):
    return as_part(tmp_path, content, "optimizer.pt")


def as_weights(tmp_path, content, monkeypatch):
    return as_part(tmp_path, content, "model.safetensors")


def as_part(tmp_path, content, name):
    """A checkpoint whose checksums are all right."""
    path = checkpoint.save(tmp_path, 1, jobs.state(1))
    (path / name).write_bytes(content)
    rewrite(path, lambda manifest: manifest["files"].__setitem__(
        name, {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    ))  # fmt: skip
    with pytest.raises(UserError, match="holds other things than tensors"):
        checkpoint.load(path)


def rewrite(path, change):
    """Change a checkpoint's manifest and its checksum."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = checkpoint._manifest_sha256(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def as_npz(tmp_path, content, monkeypatch):
    path = tmp_path / "images.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"images\.npz (cannot be read|has no array)"):
        load_dataset(path)
    with zipfile.ZipFile(path, "w") as archive:  # as an array inside of it, too
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (2,)})
        archive.writestr("images.npy", header.getvalue() + content)
    with pytest.raises(UserError, match=r"images\.npz (cannot be read|has no array)"):
        load_dataset(path)


def as_batches(tmp_path, content, monkeypatch):
    folder = tmp_path / cifar.FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "test_batch").write_bytes(content)
    monkeypatch.setitem(cifar.BATCHES["test"], "test_batch", hashlib.md5(content).hexdigest())
    with pytest.raises((UserError, pickle.UnpicklingError)):
        load_dataset("cifar10", root=tmp_path, split="test")


def as_image_cache(tmp_path, content, monkeypatch):
    path = tmp_path / "cache.npz"
    path.write_bytes(content)
    built = Decoded(np.zeros((2, 8, 8, 3), np.uint8), None, {})
    assert cached(path, lambda: built).images is built.images


def as_statistics_cache(tmp_path, content, monkeypatch):
    path = tmp_path / "sums.npz"
    path.write_bytes(content)
    assert cached_arrays(path, dict) == {}


def test_no_pickle_is_executed(tmp_path, promise, monkeypatch):
    marker = tmp_path / "executed"
    for content in malicious(marker):  # they do work
        pickle.loads(content) if content[:2] != b"PK" else torch.load(io.BytesIO(content), weights_only=False)
        assert marker.exists()
        marker.unlink()
    doors = (as_optimizer, as_weights, as_npz, as_batches, as_image_cache, as_statistics_cache)
    with promise("Untrusted files: no pickle is executed", "pickle and place") as p:
        for door in doors:
            for index, content in enumerate(malicious(marker)):
                folder = tmp_path / f"{door.__name__}-{index}"
                folder.mkdir()
                with p.case(f"{door.__name__} {index}"):
                    door(folder, content, monkeypatch)
                    assert not marker.exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "other.pt", ""])
def test_a_manifest_names_no_other_files(tmp_path, name):
    path = checkpoint.save(tmp_path / "checkpoints", 1, jobs.state(1))
    (tmp_path / "checkpoints" / "secret.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    rewrite(path, lambda m: m["files"].__setitem__(name, m["files"]["model.safetensors"]))
    with pytest.raises(UserError, match="is no file of a checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize("change", [
    lambda m: m.__setitem__("files", []), lambda m: m.__setitem__("state", 1), lambda m: m.__setitem__("step", "1"),
    lambda m: m["files"].__setitem__("optimizer.pt", None), lambda m: m.__delitem__("files"),
])  # fmt: skip
def test_a_manifest_of_another_shape_is_damaged(tmp_path, change):
    path = checkpoint.save(tmp_path, 1, jobs.state(1))
    rewrite(path, change)
    with pytest.raises(UserError, match=r"manifest\.json"):
        checkpoint.load(path)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_an_archive_whose_names_are_a_bomb_is_refused(tmp_path, kind):
    """A header of 1 GB of zeros, packed to 1 MB: tarfile would read it whole before anyone sees its size."""
    path = tmp_path / "bomb.tar.gz"
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = kind, 2**30
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
        archive.fileobj.write(member.tobuf(tarfile.USTAR_FORMAT))
        archive.fileobj.write(bytes(2**21))  # its beginning is enough: the rest must never be asked for
    with pytest.raises(UserError, match="a header of 1073741824 bytes"):
        _ = open_files(path).listing


def test_safetensors_are_no_pickles():
    """What the weights are read with refuses a pickle by itself, without our checks."""
    from safetensors.torch import load

    with pytest.raises(SafetensorError):
        load(pickle.dumps({"a": 1}))


# Members that point outside, links, devices and bombs by size: tests/data/test_files.py.

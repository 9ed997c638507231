import json
import os

import pytest
import torch

from fastdiff.errors import UserError
from fastdiff.runs import checkpoint


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = {"a.weight": torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(5, generator=generator)}}}
    return {
        "model": model,
        "ema": {k: v / 2 for k, v in model.items()},
        "optimizer": optimizer,
        "loss_history": [[1, 0.1], [2, 1 / 3]],
        "best": None,
    }


def test_what_is_loaded_is_what_was_saved(tmp_path):
    path = checkpoint.save(tmp_path, 7, state())
    assert path == tmp_path / "step-7"
    assert sorted(p.name for p in path.iterdir()) == [
        "ema.safetensors", "manifest.json", "model.safetensors", "optimizer.pt",
    ]  # fmt: skip
    found = checkpoint.load_latest(tmp_path)
    assert (found.step, found.path, found.skipped) == (7, path, [])
    expected = state()
    assert torch.equal(found.state["model"]["a.weight"], expected["model"]["a.weight"])
    assert torch.equal(found.state["ema"]["a.weight"], expected["ema"]["a.weight"])
    assert torch.equal(found.state["optimizer"]["state"][0]["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"])
    assert found.state["loss_history"] == expected["loss_history"]
    assert found.state["best"] is None


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(PermissionError, match="Permission denied"):
        checkpoint.load_latest(tmp_path)


def test_permissions_are_as_the_umask_has_them(tmp_path, modes):
    checkpoint.save(tmp_path, 1, state())
    assert modes(tmp_path) == {"0o770", "0o660"}


def test_the_newest_is_taken_by_number_not_by_name(tmp_path):
    assert checkpoint.load_latest(tmp_path) is None
    assert checkpoint.load_latest(tmp_path / "missing") is None
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, step, state(step))
    assert checkpoint.load_latest(tmp_path).step == 100


def test_saving_the_same_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 1, state(0))
    checkpoint.save(tmp_path, 1, state(1))
    assert torch.equal(checkpoint.load_latest(tmp_path).state["model"]["a.weight"], state(1)["model"]["a.weight"])
    assert os.listdir(tmp_path) == ["step-1"]


# Flips and truncations: tests/reliability/test_corruption.py.
@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["delete", "empty", "folder"])
def test_a_file_that_is_none_is_found_and_the_older_checkpoint_taken(tmp_path, name, damage):
    checkpoint.save(tmp_path, 1, state(1))
    file = checkpoint.save(tmp_path, 2, state(2)) / name
    if damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    if damage == "folder":
        file.mkdir()
    found = checkpoint.load_latest(tmp_path)
    assert found.step == 1
    ((skipped, reason),) = found.skipped
    assert skipped == tmp_path / "step-2"
    assert name in reason
    with pytest.raises(UserError, match="step-2 cannot be used"):
        checkpoint.load(tmp_path / "step-2")


def test_if_none_verifies_it_says_so(tmp_path):
    (checkpoint.save(tmp_path, 1, state()) / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no checkpoint .* can be used .*optimizer\.pt has 1 byte instead of"):
        checkpoint.load_latest(tmp_path)


def test_a_failed_save_leaves_nothing_and_keeps_the_old_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, state(1))
    for broken in ("_serialize", "write_synced", "sync"):
        with monkeypatch.context() as patch:

            def fail(*arguments):
                raise OSError(28, "No space left on device")

            patch.setattr(checkpoint, broken, fail)
            for step in (1, 2):
                with pytest.raises(
                    checkpoint.NotSaved, match=r"No space left .* bytes are free, about [\d,]+ are needed"
                ):
                    checkpoint.save(tmp_path, step, state(2))
        assert os.listdir(tmp_path) == ["step-1"]
        assert checkpoint.load_latest(tmp_path).step == 1


def test_a_wrappers_prefix_is_refused(tmp_path):
    for prefix in ("_orig_mod.", "module."):
        with pytest.raises(ValueError, match="unwrapped"):
            checkpoint.save(tmp_path, 1, {"model": {f"{prefix}w": torch.zeros(1)}, "ema": {}, "optimizer": {}})
    assert os.listdir(tmp_path) == []


def test_a_later_format_is_named(tmp_path):
    path = checkpoint.save(tmp_path, 1, state()) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="its format is 99, this version reads 1"):
        checkpoint.load(path.parent)


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        checkpoint.save(tmp_path, step, state())
    (tmp_path / ".saving-left-behind").mkdir()
    checkpoint.prune(tmp_path, 5, keep_last=2, keep_steps={1})
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-4", "step-5"]
    checkpoint.save(tmp_path, 3, state())
    checkpoint.prune(tmp_path, 3, keep_last=1, keep_steps=set())
    assert os.listdir(tmp_path) == ["step-3"]


def test_a_crash_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    checkpoint.save(tmp_path, 1, state(0))
    (tmp_path / "step-1").rename(tmp_path / "step-1.replaced")
    (tmp_path / ".saving-half").mkdir()
    assert checkpoint.load_latest(tmp_path).step == 1
    assert sorted(os.listdir(tmp_path)) == [".saving-half", "step-1.replaced"]  # whoever only reads changes nothing
    checkpoint.recover(tmp_path)
    assert os.listdir(tmp_path) == ["step-1"]
    assert checkpoint.load_latest(tmp_path).step == 1


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_what_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, name):
    """Passing over it would in the end delete the newest good checkpoint."""
    checkpoint.save(tmp_path, 1, state())
    checkpoint.save(tmp_path, 2, state())
    real = type(tmp_path).read_bytes

    def read(path):
        if path.name == name and path.parent.name == "step-2":
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(type(tmp_path), "read_bytes", read)
    with pytest.raises(UserError, match=f"{name} cannot be read .Input/output error"):
        checkpoint.load_latest(tmp_path)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_the_new_one(tmp_path, monkeypatch):
    """By the run, which others may look at meanwhile."""
    checkpoint.save(tmp_path, 1, state(0))
    checkpoint.save(tmp_path, 2, state(1))
    real = checkpoint._read_part

    def read_part(*arguments):
        monkeypatch.setattr(checkpoint, "_read_part", real)
        checkpoint.save(tmp_path, 2, state(2))
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "_read_part", read_part)
    found = checkpoint.load_latest(tmp_path)
    assert (found.step, found.skipped) == (2, [])
    assert torch.equal(found.state["model"]["a.weight"], state(2)["model"]["a.weight"])

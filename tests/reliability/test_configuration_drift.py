"""Resuming with another configuration, and runs that another version wrote."""

import json
import shutil
from pathlib import Path

import pytest

from fastdiff.config import RESUMABLE_CHANGES, Config
from fastdiff.errors import UserError
from fastdiff.runs import checkpoint
from fastdiff.training.resume import find_checkpoint
from tests.reliability import jobs
from tests.reliability.test_untrusted_files import rewrite

FORMAT_1 = Path(__file__).with_name("format-1")  # a run of 4 steps, written by the first version


@pytest.fixture
def old_run(tmp_path):
    """A copy of the run that the first version wrote, and its config with the fields that are new since at default."""
    run = shutil.copytree(FORMAT_1 / "run", tmp_path / "working" / "1")
    shutil.copy(FORMAT_1 / "images.npz", tmp_path)
    values = json.loads((run / "config.json").read_text())
    config = Config.from_dict(values).replace(data=str(tmp_path / "images.npz"), steps=8)
    path = next((run / "checkpoints").iterdir())
    rewrite(path, lambda manifest: manifest["state"]["config"].__setitem__("data", config.images.data))
    return run, config


def test_a_run_of_the_first_version_goes_on(tmp_path, old_run):
    run, config = old_run
    log = tmp_path / "log"
    assert jobs.finish(jobs.start(jobs.train_run, config, run, log=log)) == 0, log.read_text()
    assert checkpoint.load_latest(run / "checkpoints").step == 8
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(range(1, 9))


def test_every_difference_is_named_and_what_is_free_to_change(old_run):
    run, config = old_run
    changed = config.replace(lr=0.5, batch_size=16, seed=3, dropout=0.5)
    with pytest.raises(UserError) as caught:
        find_checkpoint(changed, run)
    message = str(caught.value)
    for part in (
        "--lr was 0.001, now 0.5",
        "--batch-size was 8, now 16",
        "--seed was 0, now 3",
        "--dropout was 0.0, now",
    ):
        assert part in message
    free = [f"--{name.replace('_', '-')}" for name in sorted(RESUMABLE_CHANGES)]
    assert message.endswith(f"free to change are {', '.join(free)}.")
    assert "\n" not in message


def test_each_change_is_allowed_or_refused_as_it_says(old_run):
    """Of every field whose type has an obvious other value."""
    run, config = old_run
    refused = allowed = 0
    for name, value in config.flat().items():
        if isinstance(value, bool) or not isinstance(value, int | float) or name in ("image_channels", "timesteps"):
            continue
        try:
            other = type(value)(value * 2 if value else 0.25)
            changed = config.replace(**{name: other})
        except UserError:
            continue  # impossible by itself
        if changed.flat()[name] == value:
            continue
        if name in RESUMABLE_CHANGES:
            find_checkpoint(changed, run)
            allowed += 1
        else:
            with pytest.raises(UserError, match=f"--{name.replace('_', '-')} was"):
                find_checkpoint(changed, run)
            refused += 1
    assert refused >= 8
    assert allowed >= 6


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path):
    """An older checkpoint must not be taken instead: the next save would then delete the newer ones."""
    checkpoint.save(tmp_path, 1, jobs.state(1))
    newer = checkpoint.save(tmp_path, 2, jobs.state(2))
    rewrite(newer, lambda manifest: manifest.__setitem__("format", 2))
    with pytest.raises(UserError, match="step-2: its format is 2, this version reads 1; use the version"):
        checkpoint.load_latest(tmp_path)


def test_fields_of_a_newer_version_are_named(old_run):
    run, config = old_run
    path = next((run / "checkpoints").iterdir())
    rewrite(path, lambda manifest: manifest["state"]["config"].__setitem__("warp_factor", 9))
    with pytest.raises(UserError, match="warp_factor"):
        find_checkpoint(config, run)

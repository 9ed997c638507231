import json
import time

import numpy as np
import pytest
import torch

from fastdiff.config import Config
from fastdiff.errors import UserError
from fastdiff.model_sections import UNetConfig
from fastdiff.reporting.profiling import analyse, read_trace
from fastdiff.reporting.recording import LEAD, StepRecorder, choose_begin, steps_needed
from fastdiff.runs import checkpoint
from fastdiff.training.train import train


def measured(begin, steps):
    """The steps after whose end a pause would fall into what is timed or recorded."""
    return range(begin, begin + steps_needed(steps))


@pytest.mark.parametrize(
    ("start", "last", "steps", "pauses", "begin"),
    [
        (0, 850, 5, (10**6, 10**6), (850 - 11) // 2),
        (100, 300, 5, (10**6,), (400 - 11) // 2),
        (0, None, 5, (10_000, 10_000), LEAD),
        (0, None, 5, (2**62,), LEAD),
        (700, None, 5, (10_000,), 700 + LEAD),
        (0, 850, 5, (425, 850), 426),  # from 419 the save after step 425 would be timed
        (0, None, 5, (12,), 13),
        (0, LEAD + 11, 5, (LEAD + 11,), LEAD),
    ],
)
def test_the_middle_of_the_run_but_not_across_a_checkpoint(start, last, steps, pauses, begin):
    found = choose_begin(start=start, last=last, steps=steps, pauses=pauses)
    assert found == begin
    assert not any(step % every == 0 for step in measured(found, steps) for every in pauses)
    assert last is None or found + steps_needed(steps) <= last


def test_a_place_before_the_middle_is_found_too():
    begin = choose_begin(start=0, last=40, steps=5, pauses=(22, 30))  # from the middle, 14, to the end there is none
    assert begin == 11
    assert not any(step % every == 0 for step in measured(begin, 5) for every in (22, 30))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"start": 0, "last": LEAD + 10, "steps": 5, "pauses": (100,)}, r"--profile 5 needs 21 steps .* leaves 20"),
        ({"start": 90, "last": 100, "steps": 1, "pauses": (100,)}, "but --steps leaves 10"),
        ({"start": 0, "last": 1000, "steps": 5, "pauses": (10,)}, "between two checkpoints"),
        ({"start": 0, "last": None, "steps": 5, "pauses": (10,)}, "between two checkpoints"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(arguments, said):
    with pytest.raises(UserError, match=said) as caught:
        choose_begin(**arguments)
    assert "\n" not in str(caught.value)


def recorder(directory, **changes):
    cpu = torch.device("cpu")
    options = {"steps": 2, "begin": 3, "device": cpu, "title": "Steps", "facts": {"network": "none"}}
    return StepRecorder(directory, **(options | changes))


def test_exactly_the_steps_asked_for_are_recorded(tmp_path):
    calls = 0
    with recorder(tmp_path / "profile") as r:
        for step in range(1, 20):
            torch.ones(step).sum()  # the size tells which step it was
            calls += r.after_step(step) > 0
    events = read_trace(tmp_path / "profile" / "trace.json.gz")
    sizes = {tuple(e.shapes[0]) for e in events if e.kind == "op" and e.name == "aten::sum"}
    assert sizes == {(7,), (8,)}  # 3 before, 2 timed, 1 to warm up
    assert analyse(events).steps == 2
    assert calls == 6  # of the others nothing is taken off the clock
    text = (tmp_path / "profile" / "summary.md").read_text()
    assert "- network: none" in text
    assert "means of 2 steps" in text
    assert r.plain_step > 0


def test_a_loop_that_ends_early_leaves_nothing(tmp_path):
    for stop in (4, 6, 7):
        with recorder(tmp_path / "profile") as r:
            for step in range(1, stop + 1):
                r.after_step(step)
        assert not (tmp_path / "profile").exists()
    assert not torch.autograd._profiler_enabled()


@pytest.fixture
def config(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    net = UNetConfig(image_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4)
    return Config.of(
        data=str(tmp_path / "images.npz"), data_root=str(tmp_path / "data"), net=net, timesteps=100, batch_size=8,
        warmup_steps=5, steps=24, device="cpu", log_every=2, save_every=100, eval_every=100, features="none",
        eval_steps=2, grid_samples=4, run_root=str(tmp_path / "plain"),
    )  # fmt: skip


def numbers(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.lab
def test_training_goes_on_bit_for_bit(config, tmp_path, capsys):
    assert train(config) == 0
    profiled = config.replace(profile=3, run_root=str(tmp_path / "profiled"))
    assert train(profiled) == 0
    one, other = tmp_path / "plain" / "1", tmp_path / "profiled" / "1"
    assert len(numbers(one)) == 12
    assert numbers(one) == numbers(other)
    a, b = (checkpoint.load_latest(run / "checkpoints").state for run in (one, other))
    assert all(torch.equal(a[part][name], b[part][name]) for part in ("model", "ema") for name in a[part])
    assert not (one / "profile").exists()
    assert {p.name for p in (other / "profile").iterdir()} == {"trace.json.gz", "summary.md", "time.png"}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("profile")]
    assert said == [f"profile    steps 15 to 17 into {other / 'profile'}"]
    assert "recorded: steps 15 to 17" in (other / "profile" / "summary.md").read_text()

    # It may be asked for, or dropped, when a run is resumed; a profile that is there is kept.
    before = (other / "profile" / "summary.md").read_bytes()
    assert train(profiled.replace(steps=26), resume=other) == 0
    assert (other / "profile" / "summary.md").read_bytes() == before
    assert "remove it to record another" in capsys.readouterr().out
    assert train(config.replace(steps=50, profile=2), resume=one) == 0
    assert (one / "profile" / "summary.md").exists()


def test_too_many_steps_are_refused_before_the_first(config, tmp_path):
    with pytest.raises(UserError, match="--profile 30 needs 71 steps"):
        train(config.replace(profile=30))
    assert (tmp_path / "plain" / "1" / "metrics.jsonl").read_text() == ""
    with pytest.raises(UserError, match="--profile"):
        config.replace(profile=-1)


def test_what_the_device_had_still_to_do_is_training_time(tmp_path, monkeypatch):
    monkeypatch.setattr(StepRecorder, "_wait", lambda self: time.sleep(0.2))
    with recorder(tmp_path / "profile") as r:
        assert r.after_step(3) < 0.1  # before the first step that is timed
        r.after_step(4)
        r.after_step(5)
    assert r.plain_step >= 100  # milliseconds: the wait of 0.2 s is of the two timed steps

"""Choosing tiles by measurement: what is tried, and what is written."""

import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import tune_norms
from bench.norm_calls import GROUPS, all_tasks, norm_calls
from fastdiff.model_sections import UNetConfig
from kernels import launch, tuned

TASKS = all_tasks()
SHARED = 227 * 1024  # bytes that a program may have on an H100


def labelled(label):
    return next(task for task in TASKS if task.label == label)


def test_tasks_are_the_calls_of_the_network():
    calls = norm_calls(UNetConfig(dropout=0.1))
    assert sum(calls.values()) == 51  # its norms
    keys = {(call.channels, call.side**2, GROUPS, backward, call.dropout) for call in calls for backward in (0, 1)}
    assert {task.key for task in TASKS} == keys
    assert len(TASKS) == len(keys) == 30
    attention = labelled("256 channels, 16x16, add, none, backward")  # five of the six that share its tiles
    assert (attention.call.residual, attention.call.gradients, attention.images) == (True, 1, 4)
    assert labelled("384 channels, 32x32, add, no residual, forward").images == 2  # after an upsampling


def test_what_the_launch_would_not_load_ahead_is_not_tried(monkeypatch):
    """The launch's own arithmetic: 4 images of 1024 x 16 are more than a program may have."""
    task = labelled("128 channels, 32x32, add, kept, backward")
    tried, too_large = tune_norms.to_try(task, SHARED)
    module = sys.modules["kernels.group_norm_launch"]
    monkeypatch.setattr(module, "gpu_limits", lambda device: (132, SHARED))
    x = torch.empty(1, 128, 32, 32, dtype=torch.bfloat16, device="meta")
    for tiles in (*tried, *too_large):
        monkeypatch.setattr(module, "norm_tiles", lambda *args, tiles=tiles, **options: tiles)
        options = {"backward": True, "dropout": False, "adaptive": False, "images": task.images}
        *_, constants = module._meta(x, 128, GROUPS, **options)
        assert constants["AHEAD"] == (tiles.ahead > 0 and tiles in tried)
    assert any(t.ahead for t in tried)
    assert any(t.channels == 16 and t.ahead for t in too_large)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.label)
def test_what_is_tried_covers_the_channels_with_whole_groups_and_fits_in_registers(task):
    found = list(tune_norms.candidates(task))
    assert found[0] == task.rule
    for tiles in found:
        assert task.call.channels % tiles.channels == 0
        assert tiles.channels % (task.call.channels // GROUPS) == 0
        assert tiles.looped == (tiles.block_hw < task.call.side**2)
        assert tiles.block_hw * tiles.block_c <= 64 * 32 * tiles.num_warps


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.label)
def test_what_is_timed_runs_and_its_bytes_are_counted(task):
    """Every image that a call is given, and every one that it returns."""
    images = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal images
            results = func(*args, **(kwargs or {}))
            if func.namespace == "fastdiff_kernels":
                tensors = [v for v in (*args, *results) if isinstance(v, torch.Tensor) and v.dim() == 4]
                images += sum(v.nbytes for v in tensors if v.stride(1) == 1)  # the ticket is expanded
            return results

    (call,) = tune_norms.calls(task, task.rule, 1, 1, torch.device("cpu"))
    with Count():
        call()
    assert images == tune_norms.moved(task, 1)


def test_only_what_fits_on_a_multiprocessor_is_tried():
    task = labelled("256 channels, 32x32, add, backward")
    tiles = launch._tiles(16, 8, 1024, False, 8, 1)
    assert tune_norms.fits(task, tiles, 90)
    assert not tune_norms.fits(task, dataclasses.replace(tiles, ahead=2), 90)  # 65,536 registers, all of one
    assert not tune_norms.fits(task, tiles, 80)  # 192 KiB of shared memory
    assert not tune_norms.fits(task, dataclasses.replace(tiles, num_warps=4, ahead=0), 90)  # spills


def test_what_is_written_spills_for_no_call_site():
    """512 channels, 16x16, backward: the first spills where nothing is added up, which shares its key."""
    task = labelled("512 channels, 16x16, add, backward")
    spilling, good = launch._tiles(64, 16, 256, False, 16, 1), launch._tiles(32, 16, 256, False, 4)
    assert tune_norms.fits(task, spilling, 90)
    assert sorted(tune_norms.call_sites(task)) == ["add", "add, kept", "add, none", "none", "plain", "shift"]
    times = {task.rule: 2.0, spilling: 1.0, good: 1.5, launch._tiles(64, 16, 256, False, 8): 2.5}
    found = [tune_norms.Timed(ratio, tiles) for tiles, ratio in times.items()]
    with ThreadPoolExecutor(1) as pool:
        assert tune_norms.best_everywhere(task, found, pool) == found[2]
        assert tune_norms.best_everywhere(task, found[:2] + found[3:], pool) == found[0]


def test_what_is_written_is_what_is_chosen(monkeypatch):
    first, second = TASKS[:2]
    better = dataclasses.replace(first.rule, num_warps=first.rule.num_warps // 2, ahead=2)
    chosen = {
        first: (tune_norms.Timed(2.0, first.rule), tune_norms.Timed(1.5, better)),
        second: (tune_norms.Timed(2.0, second.rule), tune_norms.Timed(1.99, better)),  # no more than noise
    }
    environment = {"device": "GPU", "torch": "2", "triton": "3", "date": "today"}
    written: dict = {}
    exec(tune_norms.source(chosen, 128, environment), written)
    monkeypatch.setattr(launch, "NORM_TILES", written["NORM_TILES"])
    assert written["NORM_TILES"].keys() == {first.key}
    c, pixels, groups, backward, dropout = first.key
    options = {"itemsize": 2, "backward": backward, "dropout": dropout}
    assert launch.norm_tiles(c, pixels, groups, **options) == better
    assert launch.norm_tiles(c, pixels, groups, **(options | {"itemsize": 4})) != better  # measured in 16 bits


def test_the_command_writes_the_fastest_that_fit(tmp_path, monkeypatch, capsys):
    """As on a GPU, but for the clock, the processes and the GPU's limits."""
    task = labelled("128 channels, 32x32, add, kept, backward")
    tried, too_large = tune_norms.to_try(task, SHARED)
    fastest, spilling = [t for t in tried if t.ahead][:2]  # which spills depends on Triton
    monkeypatch.setattr(tune_norms, "all_tasks", lambda: (task,))
    monkeypatch.setattr(tune_norms, "REPO", tmp_path)
    monkeypatch.setattr(tune_norms, "compile_one", lambda work: work[1] != spilling)
    monkeypatch.setattr(launch, "gpu_limits", lambda device: (132, SHARED))

    def measure(task, tried, batch, device):
        assert tried[0] == task.rule
        assert not {spilling, *too_large} & set(tried)
        return 1e-5, [tune_norms.Timed(2.0 - 0.1 * (t == fastest), t) for t in tried]

    monkeypatch.setattr(tune_norms, "measure", measure)
    monkeypatch.setattr(
        tune_norms, "environment", lambda device: dict.fromkeys(("device", "torch", "triton", "date"), "-")
    )
    (tmp_path / "kernels").mkdir()
    assert tune_norms.main(write=True, out=tmp_path / "tuned.py", processes=1) == 0
    told = capsys.readouterr().out
    assert f"{fastest.channels} x {fastest.block_hw}, {fastest.num_warps} warps, ahead {fastest.ahead}  chosen" in told
    assert told.count("not tried: ") == len(too_large) > 0
    assert "16 x 1024, 8 warps, ahead 1: 260 KiB of shared memory, of 227" in told
    assert (tmp_path / "tuned.py").read_text() == (tmp_path / "kernels" / "tuned.py").read_text()
    written: dict = {}
    exec((tmp_path / "tuned.py").read_text(), written)
    value = fastest.channels, fastest.block_hw, fastest.num_warps, fastest.ahead
    assert written["NORM_TILES"] == {task.key: value}


def test_the_committed_tiles_are_among_those_that_are_tried():
    by_key = {task.key: task for task in TASKS}
    for key, chosen in tuned.NORM_TILES.items():
        tried = {(t.channels, t.block_hw, t.num_warps, t.ahead) for t in tune_norms.candidates(by_key[key])}
        assert chosen in tried

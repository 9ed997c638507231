"""Switches of the training step: in force while the step is built and compiled, and only then."""

from dataclasses import replace

import pytest
import torch

from bench import levers
from bench.suite import make_size
from fastdiff.nets import fuse
from fastdiff.runtime import device
from kernels import launch

SIZE = make_size("tiny")


def state():
    options = device.compile_options()
    return fuse.RULES, options, dict(launch.NORM_TILES), torch.compiler.config.cache_key_tag


@pytest.fixture
def seen(monkeypatch):
    """What was in force when a step was built and when it ran, and the kernels that it was to have."""
    found = []

    def train_step(size, *, kernels, compile, graphs):
        assert compile
        assert graphs
        found.append((kernels, state()))
        return lambda batch, i: found.append((kernels, state()))

    monkeypatch.setattr(levers, "train_step", train_step)
    return found


def test_each_lever_changes_one_thing(seen):
    before, tags = state(), set()
    for name, lever in levers.LEVERS.items():
        seen.clear()
        levers.lever_step(SIZE, name, lever)
        assert len(seen) > 4  # warm: compiled and captured
        assert all(each == seen[0] for each in seen)
        kernels, (rules, options, tiles, tag) = seen[0]
        changed = [kernels != "triton", rules != before[0], options != before[1], tiles != before[2]]
        assert changed.count(True) == 1, name
        tags.add(tag)
        assert state() == before
    assert len(tags) == len(levers.LEVERS) >= 6  # no lever finds another's code in the caches
    assert before[3] not in tags


def test_every_rule_is_left_out_once(seen):
    for name, lever in levers.LEVERS.items():
        levers.lever_step(SIZE, name, lever)
    left_out = {rule for _, (rules, *_) in seen for rule in set(fuse.RULES) - set(rules)}
    assert left_out == set(fuse.RULES) - {fuse.drop_identities}


def test_tiles_of_a_file_are_taken_whole(seen, tmp_path):
    tags = []
    for warps in (4, 8):
        file = tmp_path / "tuned.py"
        file.write_text(f"NORM_TILES = {{(8, 16, 2, False, False): (8, 16, {warps}, 0)}}\n")
        ((name, lever),) = levers.levers(replace(SIZE, tiles=file)).items()
        levers.lever_step(replace(SIZE, tiles=file), name, lever)
        _, (_, _, tiles, tag) = seen[-1]
        assert tiles == {(8, 16, 2, False, False): (8, 16, warps, 0)}
        tags.append(tag)
    assert tags[0] != tags[1]
    assert state()[2] != tiles

"""Flipped bits and truncations in every file of a checkpoint."""

import pytest

from fastdiff.errors import UserError
from fastdiff.runs import checkpoint
from tests.reliability import jobs
from tests.reliability.conftest import counts

FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt", "manifest.json")


@pytest.mark.parametrize("damage", ["flip", "truncation"])
@counts(fast=40, slow=200)
def test_damage_is_never_loaded(tmp_path, promise, count, damage):
    checkpoint.save(tmp_path, 1, jobs.state(1))
    newest = checkpoint.save(tmp_path, 2, jobs.state(2))
    with promise(f"Silent corruption: a {damage} is found and named, the older checkpoint taken", f"{damage}s") as p:
        for index in range(count):
            random = jobs.random_source(damage, index)
            file = newest / FILES[index % len(FILES)]
            pristine = file.read_bytes()
            data = bytearray(pristine)
            if damage == "flip":
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            else:
                del data[random.randrange(len(data) - 1) :]
            file.write_bytes(data)
            with p.case(f"{damage} {index} of {file.name}"):
                found = checkpoint.load_latest(tmp_path)
                assert found is not None
                assert found.step == 1
                assert jobs.same_state(found.state, jobs.state(1))
                ((skipped, reason),) = found.skipped
                assert skipped == newest
                assert file.name in reason
                with pytest.raises(UserError, match="step-2 cannot be used"):
                    checkpoint.load(newest)
            file.write_bytes(pristine)
        assert checkpoint.load(newest).step == 2

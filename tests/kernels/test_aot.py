"""What the compiler makes of the kernels, without a GPU: no spills, 16-byte accesses (all shapes: bench/aot.py)."""

from dataclasses import replace

import pytest

from bench import aot
from bench.compiled_code import width_of
from kernels import REGISTRY
from kernels.group_norm_jobs import UNET_SHAPES, VARIANTS, norm_jobs
from kernels.launch import _tiles

# Both extremes of height and of channels a group, the 12-channel groups; with nothing and with everything switched on.
SHAPES = ((128, 32), (384, 32), (512, 16), (512, 8), (512, 4))


def test_no_spills_and_wide_accesses(compiled):
    jobs = [job for shape in SHAPES for variant in ("plain", "all") for job in norm_jobs(*shape, variant)]
    jobs += [job for shape in ((128, 32), (256, 16)) for job in norm_jobs(*shape, "shift+dropout")]
    jobs += [job for shape in SHAPES for job in norm_jobs(*shape, "add")]
    jobs += [*norm_jobs(128, 16, "add, kept"), *REGISTRY["merge_columns"].jobs()]
    jobs += [*REGISTRY["adam_ema"].jobs(), *REGISTRY["ema_update"].jobs()]
    work = [(job, 90) for job in jobs]
    work += [(job, sm) for job in jobs if job.label in ("C=128 32x32 all", "C=384 32x32 plain") for sm in (80, 100)]
    rows = aot.build_all(work)
    assert {(r.job.label, r.sm, r.stack) for r in rows if r.stack} == set()
    assert {(r.job.label, r.sm, r.narrow) for r in rows if r.narrow} == set()
    assert all(r.wide >= 2 for r in rows)
    # two programs of 8 warps share a multiprocessor's 65,536 registers
    assert all(r.registers <= 128 for r in rows if r.job.name == "backward_loop"), "the backward halves its occupancy"


# Channels, side, what is switched on -> channels, pixels and warps of a tile; images that forward and backward read.
AHEAD = {
    (128, 32, "plain"): (16, 1024, 8, (1, 2)),
    (256, 32, "add"): (16, 1024, 8, (3, 3)),
    (384, 32, "add"): (24, 64, 4, (3, 3)),  # looped
    (512, 16, "add"): (32, 256, 4, (3, 3)),
}


@pytest.mark.parametrize("shape", AHEAD, ids=str)
def test_programs_load_ahead_within_their_shared_memory(shape, compiled):
    """A wait that leaves nothing under way would make shared memory a detour: only the compiler's code shows it."""
    channels, side, variant = shape
    own, pixels, warps, images = AHEAD[shape]
    tiles = _tiles(own, channels // 32, pixels, pixels < side**2, warps, 1)
    for job, read in zip(norm_jobs(channels, side, variant, tiles=tiles), images, strict=True):
        row = aot.build(job, 90)
        assert row.ahead
        assert (row.stack, row.narrow) == (0, ())
        assert 2 * read * tiles.block_c * pixels * 2 <= row.shared <= tiles.shared_bytes(read, 2)
    for job in norm_jobs(channels, side, variant, tiles=replace(tiles, ahead=0)):
        assert not aot.build(job, 90).ahead


def test_no_argument_has_the_name_that_inductors_launcher_adds():
    """It would be a SyntaxError, and only on a GPU."""
    kernels = {job.kernel: aot.function(job) for job in aot.all_jobs()}
    assert len(kernels) == 7
    assert not [name for name, kernel in kernels.items() if "stream" in kernel.arg_names]


def test_a_spill_and_a_narrow_access_are_noticed(compiled):
    """The counters count: a tile too large for its warps spills; rows of 99 channels are not 16-byte aligned."""
    forward, _ = norm_jobs(128, 32, "plain")
    assert aot.build(replace(forward, num_warps=2), 90).stack > 0
    odd = dict(forward.constants) | {"C": 99, "PER_GROUP": 3, "OWN": 24, "BLOCK_G": 8}
    assert aot.build(replace(forward, constants=odd, num_warps=16), 90).narrow


def test_the_committed_table_is_clean(repo):
    text = (repo / "bench" / "results" / "aot.md").read_text()
    assert "kernels with a stack frame (spills): 0 of" in text
    wide, total = text.split("flat buffers: ")[1].split("\n")[0].split(" of ")
    assert wide == total


def test_every_unet_shape_is_in_the_table(repo):
    text = (repo / "bench" / "results" / "aot.md").read_text()
    for channels, side in UNET_SHAPES:
        for sm in aot.ARCHITECTURES:
            for variant in VARIANTS:
                rows = [
                    line for line in text.splitlines() if f"| C={channels} {side}x{side} {variant} | {sm} |" in line
                ]
                assert len(rows) == 2, (channels, side, sm, variant)


@pytest.mark.parametrize(
    ("instruction", "width"), [("ld.global.v4.b32", 16), ("st.global.b16", 2), ("ld.global.L1::evict_last.v4.b32", 16)]
)
def test_width_of_an_access(instruction, width):
    assert width_of(instruction.replace(".L1::evict_last", "")) == width

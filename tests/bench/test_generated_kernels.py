"""Inductor's copies of our kernels, in its code for a GPU, compile with the arguments and hints that it gives them."""

import re

import pytest
import torch
import triton
from torch._inductor.runtime import triton_heuristics
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import aot, inductor_mock, step_variants
from bench.compiled_code import access_widths, resources
from fastdiff.model_sections import UNetConfig
from kernels import launch
from tests import generated

OURS = re.compile(r"async_compile\.triton\('((?:forward|backward)_(?:tile|loop)|merge_kernel)', '''(.*?)'''", re.DOTALL)
IMAGES = frozenset().union(*(job.wide for job in aot.all_jobs()))


# Two levels of the published network, with its widths: norms of other shapes are not promised to be free of spills.
PUBLISHED = UNetConfig(channel_mult=(1, 2), blocks_per_level=1)

AHEAD = {
    (128, 1024, 32, False, False): (16, 1024, 8, 1),
    (128, 1024, 32, True, False): (16, 1024, 8, 1),
    (256, 256, 32, True, False): (32, 256, 4, 2),
    (256, 1024, 32, True, False): (64, 32, 8, 1),
}


def load(source, folder, monkeypatch):
    """Import a kernel's source -> the kernel, what Inductor tells Triton of its arguments, and its warps."""
    found = []

    def decorator(configs, triton_meta, **_):
        return lambda kernel: found.append((kernel, triton_meta, configs[0]["num_warps"]))

    monkeypatch.setattr(triton_heuristics, "user_autotune", decorator)
    generated.load(source.replace("\\\\", "\\"), folder)
    return found[0]


@pytest.mark.skipif(not torch.__version__.startswith(inductor_mock.TORCH), reason="the counter knows other versions")
@pytest.mark.parametrize("ahead", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_inductors_copies_of_our_kernels_compile_without_spills_and_with_wide_accesses(ahead, tmp_path, monkeypatch):
    """Rows of a shared tensor and expanded vectors must keep the alignment that wide accesses need."""
    if ahead:
        monkeypatch.setattr(launch, "NORM_TILES", AHEAD)
    graphs = step_variants.graphs_of("ours", PUBLISHED, 128)
    sources = {(name, source) for graph in graphs for name, source in OURS.findall(graph.code)}
    assert {name for name, _ in sources} >= {"forward_tile", "backward_tile", "merge_kernel"}
    ahead_of = set()
    for name, source in sorted(sources):
        kernel, meta, num_warps = load(source, tmp_path, monkeypatch)
        arguments = ASTSource(kernel, meta["signature"], constexprs=meta["constants"], attrs=meta["configs"][0])
        compiled = triton.compile(
            arguments, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "enable_fp_fusion": True}
        )
        _, stack = resources(compiled.asm["cubin"])
        ahead_of |= {name} if meta["constants"].get("AHEAD") else set()
        passed = [argument for argument, kind in meta["signature"].items() if kind != "constexpr"]
        widths = access_widths(compiled.asm["ptx"], {i for i, argument in enumerate(passed) if argument in IMAGES})
        assert stack == 0, (name, meta)
        assert set(widths) == {16}, (name, meta)
    assert ahead_of == ({"forward_tile", "backward_tile", "backward_loop"} if ahead else set())

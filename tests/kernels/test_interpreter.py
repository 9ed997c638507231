"""The tests of this folder once more with the Triton kernels in the interpreter; planted bugs must fail them."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")


ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def test_all_kernels_in_the_interpreter(repo):
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-x", "-m", "not gpu", "--tb=short", "-rN"]
    done = subprocess.run(command, cwd=repo, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 60


# name -> file, the right text, the wrong one, the tests that must notice
BUGS = {
    "none, so that the copies themselves are sound": ("ema.py", "ok = i < n ", "ok = i < n ", "ema_update"),
    "wrong eps": (
        "group_norm_forward.py",
        "variance + EPS",
        "variance + 2 * EPS",
        "group_norm_silu and 4 and channels and float32",
    ),
    "missing group": (
        "group_norm_math.py",
        "== group[:, None]  # [BG, BC] one-hot",
        "== group[:, None] + 1  # [BG, BC] one-hot",
        "group_norm_silu and 12",
    ),
    "stale dropout mask": (
        "group_norm_backward.py",
        "first, stream_id, threshold",
        "first, stream_id + 1, threshold",
        "group_norm_silu and everything",
    ),
    "stale padding mask": (
        "group_norm_forward.py",
        "zero_outside(u - mean_c[None, :], ok2, whole)",
        "u - mean_c[None, :]",
        "group_norm_silu and 7x5",
    ),
    "an image's share at its neighbour's place": (
        "group_norm_backward.py",
        "tl.store(part_bias_ptr + here, b * one_plus",
        "tl.store(part_bias_ptr + channel, b * one_plus",
        "group_norm_silu",
    ),
    "programs that load ahead forget their last tile": (
        "group_norm_math.py",
        "tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))",
        "tl.maximum(tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0)) - 1, 1)",
        "ahead and group_norm_silu and channels and float32",
    ),
    "residual forgotten": (
        "group_norm_math.py",
        "u += load(residual_ptr + offset, ok, WHOLE, EVICT).to(tl.float32)",
        "u += 0",
        "add_group_norm_silu and residual",
    ),
    "seam a channel too far": (
        "group_norm_math.py",
        "ok & (channel >= C_X)[None, :], False, EVICT)",
        "ok & (channel > C_X)[None, :], False, EVICT)",
        "add_group_norm_silu and seam",
    ),
    "a gradient of the sum forgotten": (
        "group_norm_backward.py",
        'dx += load(du2_ptr + here, ok2, whole, "").to(tl.float32)',
        "dx += 0",
        "add_group_norm_silu and residual",
    ),
    "a shift's gradient without the sum's other uses": (
        "group_norm_backward.py",
        "tl.sum(zero_outside(dx, ok2, whole), 0), n",
        'tl.sum(zero_outside(dx - load(du_ptr + here, ok2, whole, "").to(tl.float32), ok2, whole), 0), n',
        "add_group_norm_silu and everything",
    ),
    "one image's row for all": (
        "group_norm_math.py",
        "n.to(tl.int64) * row + channel",
        "n.to(tl.int64) * 0 + channel",
        "group_norm_silu and each",
    ),
    "columns of the next matrix": ("merge_columns.py", "which * C + column[None, :], v", "column[None, :], v", "merge"),
    "no bias correction": ("adam_ema.py", "(lr / correction1)", "lr", "adam_ema"),
    "1 - beta2 in float32": (
        "adam_ema.py",
        "(1.0 - BETA2) * (g * g)",
        "(1.0 - tl.full([1], BETA2, tl.float32)) * (g * g)",
        "adam_ema",
    ),
    "ragged end": ("ema.py", "ok = i < n ", "ok = i < n - 1 ", "ema_update"),
}


@pytest.fixture(scope="module")
def verdicts(repo, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """The contract tests on one copy of the kernels for each bug -> pytest's exit status and output."""
    no_cache = shutil.ignore_patterns("__pycache__")
    copies = {name: tmp_path_factory.mktemp("planted") for name in BUGS}
    for name, (file, right, wrong, _) in BUGS.items():
        copy = copies[name]
        shutil.copytree(repo / "kernels", copy / "kernels", ignore=no_cache)
        shutil.copytree(repo / "tests" / "kernels", copy / "tests" / "kernels", ignore=no_cache)
        for path in ("conftest.py", "kinds.py", "interpreter.py", "numerics.py", "../pyproject.toml"):
            shutil.copy(repo / "tests" / path, copy / "tests" / path)
        text = (copy / "kernels" / file).read_text()
        assert right in text, f"{file} no longer holds {right!r}: plant the bug {name!r} elsewhere"
        (copy / "kernels" / file).write_text(text.replace(right, wrong))
    work = [word for name in BUGS for word in (str(copies[name]), BUGS[name][3])]
    command = [sys.executable, str(repo / "tests" / "kernels" / "forked.py"), *work]
    subprocess.run(command, env=ENVIRONMENT, timeout=280, check=True)
    return {name: (int((c / "status.txt").read_text()), (c / "output.txt").read_text()) for name, c in copies.items()}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_fails_the_contract(name, verdicts):
    status, output = verdicts[name]
    assert (status == 0) == (name == "none, so that the copies themselves are sound"), output[-3000:]
    if status != 0:
        assert "times the allowed" in output or ": other " in output, output[-3000:]  # not some import error

"""The tests of this folder once more with the Triton kernels in the interpreter; planted bugs must fail them."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")


def run_contract(root, *selection: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on root/tests/kernels in a fresh process in which Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", "--tb=short", "-rN", *selection]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)


def test_all_kernels_in_the_interpreter(repo):
    done = run_contract(repo, "tests/kernels", "--ignore=tests/kernels/test_aot.py")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 60


# name -> file, the right text, the wrong one, the tests that must notice
BUGS = {
    "wrong eps": ("group_norm_forward.py", "variance + EPS", "variance + 2 * EPS", "group_norm_silu and float32"),
    "missing group": (
        "group_norm_math.py",
        "== group[:, None]  # [BG, BC] one-hot",
        "== group[:, None] + 1  # [BG, BC] one-hot",
        "group_norm_silu and 12",
    ),
    "stale dropout mask": (
        "group_norm_backward.py",
        "first, stream, threshold",
        "first, stream + 1, threshold",
        "group_norm_silu and everything",
    ),
    "stale padding mask": ("group_norm_forward.py", "if BLOCK_HW != HW:", "if False:", "group_norm_silu and 7x5"),
    "forgotten images": (
        "group_norm_backward.py",
        "range(0, N, BLOCK_N)",
        "range(BLOCK_N, N, BLOCK_N)",
        "group_norm_silu",
    ),
    "no bias correction": ("adam_ema.py", "(lr / correction1)", "lr", "adam_ema"),
    "1 - beta2 in float32": (
        "adam_ema.py",
        "(1.0 - BETA2) * (g * g)",
        "(1.0 - tl.full([1], BETA2, tl.float32)) * (g * g)",
        "adam_ema",
    ),
    "ragged end": ("ema.py", "ok = i < n ", "ok = i < n - 1 ", "ema_update"),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_fails_the_contract(name, repo, tmp_path):
    file, right, wrong, selection = BUGS[name]
    shutil.copytree(repo / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        repo / "tests" / "kernels", tmp_path / "tests" / "kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    for path in ("tests/conftest.py", "tests/numerics.py", "pyproject.toml"):
        shutil.copy(repo / path, tmp_path / path)
    text = (tmp_path / "kernels" / file).read_text()
    assert right in text
    (tmp_path / "kernels" / file).write_text(text.replace(right, wrong))
    done = run_contract(tmp_path, "tests/kernels/test_contract.py", "-k", f"values_and_gradients and {selection}")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert "times the allowed" in done.stdout or "other" in done.stdout, done.stdout[-3000:]

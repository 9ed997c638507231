"""The tests here run up to three times: on a CPU (PyTorch references), in Triton's interpreter and on a GPU.

Whether Triton interprets is settled when it is first imported, so test_interpreter.py starts a second pytest for that.
"""

import pytest
import torch

from kernels.launch import INTERPRETED
from tests.interpreter import as_on_a_gpu

if INTERPRETED:
    as_on_a_gpu()


def pytest_collection_modifyitems(items):
    for item in items:
        if INTERPRETED and "compiled" in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason="not in the interpreter"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Where the op runs; in the interpreter's process "cpu" means the interpreter."""
    return torch.device(request.param)


@pytest.fixture
def compiled() -> None:
    """Marks a test that needs Triton or torch.compile as they are, not the interpreter."""
    torch.compiler.reset()

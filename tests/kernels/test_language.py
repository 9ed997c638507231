import pytest
import torch
from torch import Tensor
from torch.library import infer_schema

from kernels import language


@pytest.mark.skipif(not language.TRITON_INSTALLED, reason="needs Triton")
def test_an_op_can_be_registered_by_torch_2_11(monkeypatch):
    """It infers the schema from the function that it is given, whatever schema comes with it."""
    given = []
    monkeypatch.setattr(torch.library, "triton_op", lambda name, function, **options: given.append((function, options)))

    @language.triton_op("fastdiff_kernels::of_a_test", mutates_args=("y",))
    def op(x: Tensor, y: Tensor, n: int) -> None: ...

    ((function, options),) = given
    assert function.__globals__ is globals()
    assert (
        infer_schema(function, mutates_args=options["mutates_args"])
        == options["schema"]
        == ("(Tensor x, Tensor(a1!) y, SymInt n) -> ()")
    )

"""What every optimizer here shares: its settings, its groups of parameters, and the layout of its saved state."""

import inspect
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Group = dict[str, Any]
State = dict[Any, dict[str, Tensor]]  # by parameter


@dataclass(frozen=True)
class Settings:
    """How an update is made; each implementation takes what concerns it."""

    weight_decay: float
    """Decoupled weight decay, at least 0."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients, in (0, 1)."""
    half: Collection[nn.Parameter] = ()
    """Parameters that the network computes with in bf16; flat buffers keep copies of them."""
    accumulate: bool = False
    """Whether the gradient may come in parts (of a batch, or of ranks), whose sum is then kept in float32: in bf16 a
    part is lost where the sum is 256 times as large."""
    graphs: bool = False
    """Whether a CUDA graph must be able to capture it."""
    skip_nonfinite: bool = False
    """Whether to pass over updates that are not finite."""

    @property
    def options(self) -> dict[str, Any]:
        """What PyTorch's optimizers are given."""
        return {"weight_decay": self.weight_decay, "betas": (0.9, self.beta2)}


def parameter_groups(model: nn.Module) -> list[Group]:
    """The groups that the network names, or one of all its parameters.

    A network with rates of its own has a method `parameter_groups()` that returns a list of dicts: `params`, a list of
    its parameters, and `lr_scale`, the factor of the learning rate, 1.0 if it is left out.

    Raises:
        ValueError: an unknown key, a negative factor, or a parameter in no group or in two.
    """
    named: Callable[[], list[Group]] | None = getattr(model, "parameter_groups", None)
    given = [{"params": model.parameters()}] if named is None else named()
    groups: list[Group] = [{"lr_scale": 1.0, **group, "params": list(group["params"])} for group in given]
    for group in groups:
        if group.keys() != {"params", "lr_scale"} or not 0.0 <= group["lr_scale"] < math.inf:
            values = {name: value for name, value in group.items() if name != "params"}
            raise ValueError(f"a parameter group has params and lr_scale, which is at least 0; got {values}")
    grouped, parameters = [p for group in groups for p in group["params"]], list(model.parameters())
    if len(grouped) != len(parameters) or set(grouped) != set(parameters):
        raise ValueError("each parameter of the network must be in exactly one of its parameter groups")
    return groups


def finite(norm: Tensor, good: Tensor | None) -> Tensor:
    """Whether the gradient's norm is finite, and the step `good`: bool, 0-dim, on the device."""
    return norm.isfinite() if good is None else norm.isfinite() & good


def without_dynamo(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """PyTorch's optimizer without its import of torch._dynamo, which takes 7 s (PyTorch 2.15, Intel Xeon)."""
    names = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")
    plain: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**plain, "step": torch.no_grad()(inspect.unwrap(kind.step))})


Make = Callable[[list], torch.optim.Optimizer]  # from parameters or groups


def pack(make: Make, parameters: list[nn.Parameter], state: State) -> dict[str, Any]:
    """A state as PyTorch's optimizer saves it: one group in the network's order, whatever groups there are.

    So a checkpoint neither depends on them nor on who computed it.
    """
    optimizer = make(parameters)
    optimizer.state.update({p: state[p] for p in parameters if p in state})
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group |= {"lr": 0.0, "capturable": False}  # every step sets its own
    return saved


def unpack(make: Make, parameters: list[nn.Parameter], saved: dict[str, Any]) -> State:
    """The inverse of `pack`; empty for a parameter that no step has moved yet."""
    optimizer = make(parameters)
    optimizer.load_state_dict(saved)
    return {p: optimizer.state[p] for p in parameters}

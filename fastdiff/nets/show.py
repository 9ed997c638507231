"""A network as a table: resolution, channels, parameters and floating-point operations of each of its parts."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def parts(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The network's parts by name, those in lists one by one, in the order of registration."""
    for name, child in net.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{i}", part) for i, part in enumerate(child))
        else:
            yield name, child


def table(net: nn.Module, **inputs: Tensor) -> str:
    """A row for each part, in the order in which the network calls them, and the sums.

    Nothing is computed. Operations are the additions and multiplications for one image in convolutions, matrix
    products and attention; nothing else counts.

    Args:
        inputs: the network's arguments, for one image; only their shapes and dtypes count.
    """
    net = copy.deepcopy(net).to("meta").eval()
    lines = [_line("part", "resolution", "channels", "parameters", "GFLOP an image")]
    for name, part in parts(net):
        counter = FlopCounterMode(display=False)

        def begin(module: nn.Module, inputs: Any, counter: FlopCounterMode = counter) -> None:
            counter.__enter__()

        def end(module: nn.Module, inputs: Any, y: Any, name: str = name, counter: Any = counter) -> None:
            counter.__exit__(None, None, None)
            y = y[0] if isinstance(y, tuple) else y  # of an encoder of texts: tokens and their mask
            sides = dict.fromkeys(str(v.shape[-1]) for v in (inputs[0], y)) if y.ndim == 4 else ()
            channels = y.shape[1 if y.ndim == 4 else -1]
            lines.append(_line(name, " -> ".join(sides), f"{channels:,}", *_costs(module, counter)))

        part.register_forward_pre_hook(begin)
        part.register_forward_hook(end)
    with FlopCounterMode(display=False) as total:
        net(**{name: v.to("meta") for name, v in inputs.items()})
    return "\n".join([*lines, _line("sum", "", "", *_costs(net, total))]) + "\n"


def _costs(module: nn.Module, counter: FlopCounterMode) -> tuple[str, str]:
    return f"{sum(p.numel() for p in module.parameters()):,}", f"{counter.get_total_flops() / 1e9:.3f}"


def _line(name: str, *cells: str) -> str:
    return f"{name:<18}" + "".join(f"{cell:>16}" for cell in cells)

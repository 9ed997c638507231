"""Reading and printing graphs of torch.fx: what a node calls, where it stands, and the whole as a program."""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

Node = Any  # an fx.Node, whose arguments are typed too widely to be used


def layer(gm: fx.GraphModule, node: Any, kind: Any) -> Any:
    """The module that the node calls, if it is of this kind, else None."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = gm.get_submodule(str(node.target))
    return module if isinstance(module, kind) else None


def calls(node: Any, *functions: Callable[..., Any]) -> bool:
    """Whether the node calls one of these functions."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in functions


def calls_method(node: Any, name: str, *args: Any) -> bool:
    """Whether the node calls a tensor's method, with arguments that begin with these."""
    method = isinstance(node, fx.Node) and node.op == "call_method" and node.target == name
    return method and node.args[1 : 1 + len(args)] == args


def parameters_of(gm: fx.GraphModule, node: Node) -> tuple[Node, Node]:
    """New nodes that read weight and bias of the module that a node calls."""
    weight, bias = (gm.graph.get_attr(f"{node.target}.{name}") for name in ("weight", "bias"))
    return weight, bias


def only_user(node: Node) -> Node:
    """The node's only reader; None if there is not exactly one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def after(node: Node) -> Node:
    """Where to insert: the first place after `node` and after all inputs of the network."""
    while node.next.op == "placeholder":
        node = node.next
    return node.next


def program(fused: fx.GraphModule) -> str:
    """What a traced network runs, a call a line: layers and parameters by their names, results by numbers."""
    names: dict[fx.Node, str] = {}

    def text(value: Any) -> str:
        return str(fx.node.map_arg(value, lambda node: _Text(names[node])))

    lines = []
    for node in fused.graph.nodes:
        args = [*map(text, node.args), *(f"{key}={text(v)}" for key, v in node.kwargs.items() if v is not None)]
        if node.op in ("placeholder", "get_attr"):
            names[node] = str(node.target)
        elif calls(node, operator.getitem) and isinstance(node.args[1], int):
            names[node] = f"{args[0]}[{args[1]}]"
        elif node.op == "output":
            lines.append(f"return {args[0]}")
        else:
            names[node] = f"v{len(lines)}"
            call = node.target if isinstance(node.target, str) else node.target.__name__
            lines.append(f"{names[node]} = {call}({', '.join(args)})")
    return "\n".join(lines) + "\n"


class _Text(str):
    """Text that shows without quotes within lists."""

    __repr__ = str.__str__

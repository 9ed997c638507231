"""A network in two: what it computes of its conditions alone, and the rest.

A sampler's steps have one text: its tokens, and the keys and values of every attention to them, need no second look.
"""

from torch import fx, nn

from fastdiff.nets.fuse import drop_identities, fuse
from fastdiff.nets.graph import Node

CONDITIONS = ("labels", "text", "text_mask")  # arguments that stay as they are from step to step


def split_conditions(net: nn.Module) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Two modules over its own parameters, such that net(x, t, **conditions) = rest(x, t, **prepare(**conditions)).

    Args:
        net: plain or fused, to be run without a gradient.

    Returns:
        prepare, which gives tensors by name, and rest.

    Raises:
        ValueError: torch.fx cannot trace the network; names it.
    """
    whole = net if isinstance(net, fx.GraphModule) else fuse(net, rules=[drop_identities])  # that is, traced
    nodes = list(whole.graph.nodes)
    early: set[Node] = {node for node in nodes if node.op == "placeholder" and node.target in CONDITIONS}
    for node in nodes:  # and what follows of them and of parameters
        inputs = [each for each in node.all_input_nodes if each.op != "get_attr"]
        if inputs and early.issuperset(inputs):
            early.add(node)
    handed = [node for node in nodes if node in early and not early.issuperset(node.users)]

    prepare, rest = fx.Graph(), fx.Graph()
    here: dict[Node, Node] = {}
    for node in nodes:
        if node in early or (node.op == "get_attr" and not early.isdisjoint(node.users)):
            here[node] = prepare.node_copy(node, here.__getitem__)
    prepare.output({node.name: here[node] for node in handed})

    given = [node for node in nodes if node.op == "placeholder" and node not in early]
    there = {node: rest.node_copy(node) for node in given}
    there |= {node: rest.placeholder(node.name, default_value=None) for node in handed}
    for node in nodes:
        if node not in early and node not in there and not (node.op == "get_attr" and early.issuperset(node.users)):
            there[node] = rest.node_copy(node, there.__getitem__)
    return fx.GraphModule(whole, prepare, "Prepare"), fx.GraphModule(whole, rest, "Rest")

"""fuse(net): the same network, run by our kernels.

torch.fx traces a network into a graph of its layers' calls. Each rule below rewrites what it recognises; it knows
layers, never a network. The result is a module over the same parameters, under the same names; `program(fuse(net))`
shows what it runs, and fastdiff/nets/README.md says what each rule is worth.

    drop_identities     identities and unused dropout are removed
    merge_upsampling    nearest upsampling and its 3x3 convolution become one, with 4/9 of the products
    merge_qkv           the gradients of q, k and v are merged by one kernel
    fold_into_norms     a norm forms the sum that it reads, is scaled and shifted, and does SiLU and dropout
    merge_projections   linear layers that read one vector become one product
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastdiff import _kernels as kernels
from fastdiff.nets.dropout import Dropout
from fastdiff.nets.graph import Node, after, calls, calls_method, layer, only_user, parameters_of

Rule = Callable[[fx.GraphModule], None]


def fuse(net: nn.Module, rules: Sequence[Rule] | None = None) -> fx.GraphModule:
    """The network rewritten by the rules, for training or for evaluation as `net.training` says.

    Args:
        net: of layers that torch.fx can trace, its images in channels_last memory.
        rules: all of RULES by default.

    Returns:
        A module over `net`'s own parameters, called as `net` is.

    Raises:
        ValueError: torch.fx cannot trace the network, or `fold_into_norms` leaves a GroupNorm; names it.
    """
    rules = RULES if rules is None else rules
    try:
        fused = fx.GraphModule(net, _Tracer().trace(net))
    except (fx.proxy.TraceError, TypeError) as error:
        raise ValueError(f"torch.fx cannot trace {type(net).__name__} ({error}); use --kernels torch") from error
    for rule in rules:
        rule(fused)
        fused.graph.eliminate_dead_code()
    fused.graph.lint()
    fused = fx.GraphModule(net, fused.graph, f"Fused{type(net).__name__}")  # without the modules no longer called
    left = [name for name, module in fused.named_modules() if isinstance(module, nn.GroupNorm)]
    left += [str(node) for node in fused.graph.find_nodes(op="call_function", target=F.group_norm)]
    if left and fold_into_norms in rules:
        raise ValueError(f"the norm {left[0]} cannot be fused; use an nn.GroupNorm with weights that torch.fx sees")
    return fused


def half_parameters(net: nn.Module) -> list[nn.Parameter]:
    """Parameters that compute in bfloat16 under autocast: the layers' matrices, and biases that a layer itself adds.

    In a fused network the biases that norms add stay float32.
    """
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    biases = {m.bias for m in layers if m.bias is not None}
    tables = {m.weight for m in net.modules() if isinstance(m, nn.Embedding)}
    return [p for p in net.parameters() if (p.ndim > 1 and p not in tables) or p in biases]


class _Tracer(fx.Tracer):
    """Sees into modules that hold a norm or a convolution; others, such as an embedding, run as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = any(isinstance(part, nn.GroupNorm | nn.Conv2d) for part in m.modules())
        return not inside or super().is_leaf_module(m, module_qualified_name)


# Rules


def drop_identities(gm: fx.GraphModule) -> None:
    """Removes identities, and dropout in evaluation."""
    for node in list(gm.graph.nodes):
        dropout = layer(gm, node, Dropout | nn.Dropout)
        if layer(gm, node, nn.Identity) or (dropout is not None and not (dropout.training and dropout.p > 0)):
            node.replace_all_uses_with(node.args[0])


def merge_upsampling(gm: fx.GraphModule) -> None:
    """conv3x3(interpolate(x, scale_factor=2, mode="nearest")) becomes `kernels.upsample_conv`."""
    for node in list(gm.graph.nodes):
        conv = layer(gm, node, nn.Conv2d)
        if conv is None or not calls(node.args[0], F.interpolate):
            continue
        up = node.args[0]
        doubles = up.kwargs.get("scale_factor") == 2 and up.kwargs.get("mode") == "nearest"
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        if doubles and conv.bias is not None and shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
            with gm.graph.inserting_before(node):
                args = (up.args[0], *parameters_of(gm, node))
                node.replace_all_uses_with(gm.graph.call_function(kernels.upsample_conv, args))


def merge_qkv(gm: fx.GraphModule) -> None:
    """linear(x).chunk(3, -1) becomes `kernels.linear_qkv`."""
    for node in list(gm.graph.nodes):
        linear = layer(gm, node.args[0], nn.Linear) if calls_method(node, "chunk", 3, -1) else None
        if linear is not None and linear.bias is not None:
            with gm.graph.inserting_before(node):
                args = (node.args[0].args[0], *parameters_of(gm, node.args[0]))
                node.replace_all_uses_with(gm.graph.call_function(kernels.linear_qkv, args))


def fold_into_norms(gm: fx.GraphModule) -> None:
    """group_norm(cat([a + b + vector, skip], 1)) -> SiLU -> dropout becomes one kernel.

    It forms the sum, with the biases of the layers that give a and b, and hands it to the sum's other readers.
    """
    for node in list(gm.graph.nodes):
        norm = layer(gm, node, nn.GroupNorm)
        if norm is None or norm.weight is None:
            continue
        total, order = node.args[0], {each: i for i, each in enumerate(gm.graph.nodes)}
        others = [user for user in total.users if user is not node]
        with gm.graph.inserting_before(node):
            early = any(order[user] < order[node] for user in others)  # they need the sum before the norm can form it
            images, vectors, skip = ([total], [], None) if early else _terms(gm, total)
            shift = gm.graph.call_function(add_vectors, tuple(vectors)) if len(vectors) > 1 else None
            args = (images[0], *parameters_of(gm, node), norm.num_groups, norm.eps)
            options: dict[str, Any] = {"shift": shift or next(iter(vectors), None)}
            summed = len(images) > 1 or skip is not None or bool(others and images != [total])
            last = node
            adapted = None if summed else _adapted(node)
            if adapted is not None and all(order[vector] < order[node] for vector in adapted[1:]):
                last, options["scale"], options["offset"] = adapted
            silu = _silu_of(gm, last)
            options["activation"] = "none" if silu is None else "silu"
            last = last if silu is None else silu
            if summed:
                options |= {"residual": images[1] if len(images) > 1 else None, "skip": skip}
                call = gm.graph.call_function(kernels.add_group_norm_silu, args, options)
                y, *sums = (gm.graph.call_function(operator.getitem, (call, i)) for i in range(3))
                for i, user in enumerate(others):  # the kernel adds up two gradients of the sum
                    user.replace_input_with(total, sums[min(i, 1)])
            else:
                if dropout := layer(gm, only_user(last), Dropout):
                    last = only_user(last)
                    options |= {"dropout_p": dropout.p, "seed": _seed(gm, last), "stream": dropout.stream}
                y = gm.graph.call_function(kernels.group_norm_silu, args, options)
            last.replace_all_uses_with(y)


def merge_projections(gm: fx.GraphModule) -> None:
    """linear(x) + bias, linear'(x) + bias', ... become one product, then split; so do linear(x).chunk(2, 1), ..."""
    found = defaultdict(list)  # x, and whether biases are added -> the linear layer, what to replace, the bias
    for node in gm.graph.nodes:
        linear, user = layer(gm, node, nn.Linear), only_user(node)
        if linear is None or linear.bias is None:
            continue
        if calls(user, add_vectors) and len(user.args) == 2:
            bias = user.args[user.args[0] is node]
            if bias.op == "get_attr":
                found[node.args[0], True].append((node, user, bias.target))
        elif calls_method(user, "chunk", 2, 1):
            found[node.args[0], False].append((node, node, None))
    for (x, biased), group in found.items():
        if len(group) == 1:
            continue
        with gm.graph.inserting_before(after(x)):
            weights, biases = zip(*(parameters_of(gm, node) for node, _, _ in group), strict=True)
            added = [gm.graph.get_attr(name) for _, _, name in group] if biased else []
            product = gm.graph.call_function(project, (x, list(weights), list(biases), added))
            for i, (_, replaced, _) in enumerate(group):
                replaced.replace_all_uses_with(gm.graph.call_function(operator.getitem, (product, i)))


RULES: tuple[Rule, ...] = (drop_identities, merge_upsampling, merge_qkv, fold_into_norms, merge_projections)


# The sum that a norm reads, and what follows the norm


def _adapted(norm: Node) -> tuple[Node, Node, Node] | None:
    """norm * (1 + scale[:, :, None, None]) + offset[:, :, None, None]: this sum, scale and offset; else None."""
    product: Node = only_user(norm)
    total: Node = only_user(product) if calls(product, operator.mul) else None
    if not calls(total, operator.add):
        return None
    factor, offset = product.args[product.args[0] is norm], _vector(total.args[total.args[0] is product])
    scale = _vector(factor.args[factor.args[0] == 1]) if calls(factor, operator.add) and 1 in factor.args else None
    return None if scale is None or offset is None else (total, scale, offset)


def _vector(node: Node) -> Node:
    """v of v[:, :, None, None]; else None."""
    spread = calls(node, operator.getitem) and node.args[1] == (slice(None), slice(None), None, None)
    return node.args[0] if spread else None


def _silu_of(gm: fx.GraphModule, norm: Node) -> Node:
    """The SiLU after the norm, if it is the norm's only reader."""
    user = only_user(norm)
    return user if calls(user, F.silu) or layer(gm, user, nn.SiLU) else None


def _seed(gm: fx.GraphModule, dropout: Node) -> Node:
    """The dropout's seed or, if that is None, one drawn for the whole network."""
    given = dropout.args[1] if len(dropout.args) > 1 else dropout.kwargs.get("seed")
    for node in gm.graph.find_nodes(op="call_function", target=seed_or_drawn):
        if node.args[0] is given:
            return node
    x = next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(after(x)):
        return gm.graph.call_function(seed_or_drawn, (given, x))


def _terms(gm: fx.GraphModule, total: Node) -> tuple[list[Node], list[Node], Node | None]:
    """total = cat([sum of images and vectors, skip], 1): one or two images, any number of vectors, a skip or None."""
    inner, skip = total, None
    if calls(total, torch.cat) and (total.args[1:] == (1,) or total.kwargs == {"dim": 1}) and len(total.args[0]) == 2:
        inner, skip = total.args[0]
    images, vectors = [], []
    for term in _addends(inner, total):
        vector = _vector(term)
        (images if vector is None else vectors).append(term if vector is None else vector)
    if len(images) not in (1, 2):
        return [inner], [], skip
    return [_without_bias(gm, v, vectors) if _free(v, total) else v for v in images], vectors, skip


def _addends(node: Node, total: Node) -> list[Node]:
    """The tensors that the node sums; the node itself if others read it too."""
    tensors = all(isinstance(arg, fx.Node) and arg.op != "get_attr" for arg in node.args)
    if calls(node, operator.add, torch.add) and tensors and not node.kwargs and _free(node, total):
        return [term for arg in node.args for term in _addends(arg, total)]
    return [node]


def _free(node: Node, total: Node) -> bool:
    """Whether only the norm reads the node."""
    return node is total or len(node.users) == 1


def _without_bias(gm: fx.GraphModule, node: Node, biases: list[Node]) -> Node:
    """The image before the bias of the layer that gives it; the bias, if there is one, is appended to `biases`."""
    if calls(node, kernels.upsample_conv) and len(node.args) == 3:
        biases.append(node.args[2])
        return gm.graph.call_function(kernels.upsample_conv, node.args[:2])
    if calls_method(node, "unflatten", 2) and calls_method(node.args[0], "transpose", 1, 2):  # (N, H W, C) as an image
        rows = node.args[0].args[0]
        if layer(gm, rows, nn.Linear) and len(rows.users) == len(node.args[0].users) == 1:
            image = gm.graph.call_method("transpose", (_without_bias(gm, rows, biases), 1, 2))
            return gm.graph.call_method("unflatten", (image, *node.args[1:]))
    module = layer(gm, node, nn.Conv2d | nn.Linear)
    if module is None or module.bias is None or getattr(module, "padding_mode", "zeros") != "zeros":
        return node
    weight, bias = parameters_of(gm, node)
    biases.append(bias)
    if isinstance(module, nn.Linear):
        return gm.graph.call_function(F.linear, (node.args[0], weight))
    args = (node.args[0], weight, None, module.stride, module.padding, module.dilation, module.groups)
    return gm.graph.call_function(F.conv2d, args)


# What the rewritten graph calls besides layers and kernels


def add_vectors(*vectors: Tensor) -> Tensor:
    """The sum of vectors (C,) or (N, C)."""
    first, *rest = vectors
    for v in rest:
        first = _Add.apply(first, v) if v.shape == first.shape else first + v
    return first


class _Add(torch.autograd.Function):
    """a + b. The two gradients do not alias, or in-place clipping would scale the buffer twice."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # ty: ignore[incompatible-method-override]
        return gradient, gradient.clone()


def project(x: Tensor, weights: list[Tensor], biases: list[Tensor], added: list[Tensor]) -> tuple[Tensor, ...]:
    """x (N, E) -> linear(x, weight, bias) + added, if anything is, (N, C) each, by one product."""
    bias = add_vectors(torch.cat(biases), torch.cat(added)) if added else torch.cat(biases)
    return F.linear(x, torch.cat(weights), bias).split([len(b) for b in biases], -1)


def seed_or_drawn(seed: Tensor | None, x: Tensor) -> Tensor:
    """The seed (1,) int64 of all dropout masks; drawn from PyTorch's generator where none is given."""
    return torch.randint(2**63 - 1, (1,), device=x.device) if seed is None else seed

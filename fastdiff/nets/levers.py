"""Rules for `fuse` that may pay on a GPU and have not been timed there: `fuse(net, [*RULES, *LEVERS.values()])`.

    fork_convolutions   a convolution's two gradients are computed side by side
    pad_channels        3 channels of images are padded to 8 in the first and the last convolution

Each goes to RULES if it pays, and away if not. They come after all of RULES. A third lever needs no rule: with
TORCHINDUCTOR_ENABLE_PDL=1 Inductor's own kernels start while the one before them ends.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastdiff.nets.forked_conv import forked_conv
from fastdiff.nets.fuse import Rule
from fastdiff.nets.graph import calls, layer, parameters_of

ALIGNED = 8  # channels of 16 bytes in bf16, as tensor-core kernels take them


def fork_convolutions(gm: fx.GraphModule) -> None:
    """conv2d becomes `forked_conv`."""
    for node, args in _convolutions(gm):
        node.replace_all_uses_with(gm.graph.call_function(forked_conv, args))


def pad_channels(gm: fx.GraphModule) -> None:
    """A convolution to or from a number of channels that is no multiple of 8 becomes `padded_conv`."""
    for node, args in _convolutions(gm):
        weight = gm.get_parameter(args[1].target)
        if weight.shape[0] % ALIGNED or weight.shape[1] % ALIGNED:
            node.replace_all_uses_with(gm.graph.call_function(padded_conv, args))


LEVERS: dict[str, Rule] = {"fork": fork_convolutions, "pad": pad_channels}


def _convolutions(gm: fx.GraphModule) -> Any:
    """Each convolution without dilation, groups and other padding than zeros, and before it its (x, weight, bias,
    stride, padding)."""
    for node in list(gm.graph.nodes):
        conv = layer(gm, node, nn.Conv2d)
        with gm.graph.inserting_before(node):
            if conv is not None and _plain(conv.dilation, conv.groups) and conv.padding_mode == "zeros":
                weight, bias = parameters_of(gm, node)
                yield node, (node.args[0], weight, bias if conv.bias is not None else None, conv.stride, conv.padding)
            elif calls(node, F.conv2d) and len(node.args) == 7 and _plain(*node.args[5:]):
                yield node, node.args[:5]


def _plain(dilation: tuple[int, ...], groups: int) -> bool:
    return set(dilation) == {1} and groups == 1


def padded_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    """conv2d with channels of zeros up to multiples of 8, without which the result is returned."""
    c_out, c_in = weight.shape[:2]
    more_out, more_in = -c_out % ALIGNED, -c_in % ALIGNED
    weight = F.pad(weight, (0, 0, 0, 0, 0, more_in, 0, more_out)).contiguous(memory_format=torch.channels_last)
    x = F.pad(x, (0, 0, 0, 0, 0, more_in)).contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, weight, None if bias is None else F.pad(bias, (0, more_out)), stride, padding)
    return F.pad(y, (0, 0, 0, 0, 0, -more_out)).contiguous(memory_format=torch.channels_last)

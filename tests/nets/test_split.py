"""A network in two is the network, and what its conditions alone decide is computed in the first half."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastdiff.model_sections import UNetConfig
from fastdiff.nets.conditions import LabelEmbedding, PooledText
from fastdiff.nets.fuse import fuse
from fastdiff.nets.split import split_conditions
from fastdiff.nets.text import TextEncoder, byte_ids, word_ids
from fastdiff.nets.unet import UNet

SMALL = UNetConfig(image_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4)
MASK = torch.tensor([[True] * 5, [True, True, False, False, False], [True] + [False] * 4])
NETS = {
    "classes": (replace(SMALL, num_classes=3), {"labels": torch.tensor([0, 3, 2])}),
    "bytes": (
        replace(SMALL, text_encoder="bytes", text_width=8, text_blocks=1),
        {"text": byte_ids(["a cat", "", "two dogs"])},
    ),
    "words and classes": (
        replace(SMALL, text_encoder="words", text_width=8, text_blocks=0, num_classes=3, norm_conditioning=True),
        {"text": word_ids(["a cat", "", "two dogs"], 8), "labels": torch.tensor([0, 3, 2])},
    ),
    "tokens": (
        replace(SMALL, text_encoder="frozen", text_width=8, text_pooled=False),
        {"text": torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).double(), "text_mask": MASK},
    ),
}


@pytest.fixture(params=[(name, fused) for name in NETS for fused in (False, True)], ids=str)
def case(request):
    name, fused = request.param
    config, told = NETS[name]
    torch.manual_seed(0)
    net = UNet(config).double().eval().requires_grad_(False)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    x = torch.randn(3, 3, 8, 8).double().to(memory_format=torch.channels_last)
    return net, fuse(net) if fused else net, (x, torch.tensor([10.0, 500.0, 900.0])), told


def test_a_network_in_two_is_the_network_bit_for_bit(case):
    net, network, inputs, told = case
    prepare, rest = split_conditions(network)
    handed = prepare(**told)
    expected = network(*inputs, **told)
    assert torch.equal(rest(*inputs, **handed), expected)
    for name, value in handed.items():  # each has a part in the result
        assert not torch.equal(rest(*inputs, **{**handed, name: value.roll(1, 0)}), expected), name
    with torch.no_grad():
        for p in net.parameters():  # both halves see weights that change in place
            p.mul_(1.1)
    changed = network(*inputs, **told)
    assert not torch.equal(changed, expected)
    assert torch.equal(rest(*inputs, **prepare(**told)), changed)


def test_the_rest_reads_no_condition(case):
    net, network, _, _ = case
    prepare, rest = split_conditions(network)
    modules = dict(rest.named_modules())
    early = TextEncoder | PooledText | LabelEmbedding
    assert not any(isinstance(module, early) for module in modules.values())
    assert not any(name.endswith((".kv", ".norm_text")) for name in modules)
    assert {id(p) for part in (prepare, rest) for p in part.parameters()} == {id(p) for p in net.parameters()}
    assert sum(len(list(part.parameters())) for part in (prepare, rest)) == len(list(net.parameters()))

"""fuse(net): the same function of the same parameters, for any network of our layers, by each rule and by all."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels
from fastdiff.nets import fuse as rules
from fastdiff.nets.dropout import Dropout, tag_dropouts
from fastdiff.nets.fuse import RULES, fold_into_norms, fuse, half_parameters
from fastdiff.nets.graph import program
from fastdiff.nets.layers import SelfAttention, Upsample
from fastdiff.nets.unet import UNet, UNetConfig
from tests.numerics import assert_as_accurate

SMALL = UNetConfig(image_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4)
SMALLEST = dataclasses.replace(SMALL, channel_mult=(1,), blocks_per_level=1, attention_resolutions=(), dropout=0.1)
PUBLISHED = UNetConfig(dropout=0.1)


class Bottleneck(nn.Module):
    """Another network than the U-Net: dense connections, a sum of four, a norm without SiLU, SiLU modules."""

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config.channels
        self.stem = nn.Conv2d(config.image_channels, c, 3, padding=1)
        self.norm_1, self.norm_2 = nn.GroupNorm(2, c), nn.GroupNorm(4, 2 * c)
        self.norm_3, self.norm_4 = nn.GroupNorm(1, c), nn.GroupNorm(8, c)
        self.act = nn.SiLU()
        self.conv_1, self.conv_2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.Conv2d(2 * c, c, 1)
        self.kind, self.level = nn.Linear(1, c), nn.Linear(1, c)
        self.drop = Dropout(config.dropout)
        self.attention = SelfAttention(c, groups=2, eps=1e-5)
        self.up, self.shrink = Upsample(c), nn.Conv2d(c, config.image_channels, 2, stride=2)
        tag_dropouts(self)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, t, dropout_seed=None):
        t = t[:, None].to(x.dtype) / 1000
        x = self.stem(x)
        a = self.act(self.norm_1(x))
        h = self.drop(self.act(self.norm_2(torch.cat([self.conv_1(a), x], dim=1))), dropout_seed)
        h = self.conv_2(h) + self.level(t)[:, :, None, None] + self.kind(t)[:, :, None, None] + a
        h = self.attention(self.norm_3(h)) + h
        return self.shrink(self.act(self.norm_4(self.up(h))))


NETS = {
    "small": (UNet, SMALL),
    "without attention": (UNet, dataclasses.replace(SMALL, attention_resolutions=())),
    "attention everywhere": (UNet, dataclasses.replace(SMALL, attention_resolutions=(8, 4))),
    "one level, one block": (UNet, dataclasses.replace(SMALL, channel_mult=(2,), attention_resolutions=())),
    "odd widths": (UNet, dataclasses.replace(SMALL, channels=12, image_channels=1, norm_groups=3)),
    "another network": (Bottleneck, SMALL),
    "five classes": (UNet, dataclasses.replace(SMALL, num_classes=5)),
    "patches": (UNet, dataclasses.replace(SMALL, image_size=2 * SMALL.image_size, patch=2)),
    "adaptive norms": (UNet, dataclasses.replace(SMALL, norm_conditioning=True, dropout=0.0)),
}
EACH = [pytest.param(*net, id=name) for name, net in NETS.items()]


def make(kind, config, device="cpu"):
    """With no weight at zero: the last layers of a branch start there, and would hide what is before them."""
    torch.manual_seed(0)
    net = kind(config)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return net.to(device)


def batch(config, n=4, device="cpu"):
    x = torch.randn(n, config.image_channels, config.image_size, config.image_size, device=device)
    return x.to(memory_format=torch.channels_last), torch.linspace(0, 999, n, device=device)


def outcome(net, parameters, x, t, *, bf16=False, seed=None):
    """The prediction and the gradient of each weight, by name."""
    names, tensors = zip(*parameters, strict=True)
    cond = {"labels": torch.arange(len(x), device=x.device) % 6} if "label.weight" in names else {}
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        y = net(x, t, seed, **cond)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    return {"prediction": y, **dict(zip(names, torch.autograd.grad(y, tensors, weight), strict=True))}


@pytest.mark.parametrize(("kind", "config"), EACH)
@pytest.mark.parametrize(
    "chosen", [pytest.param([r], id=r.__name__) for r in RULES] + [pytest.param(RULES, id="all rules")]
)
def test_every_rule_keeps_values_and_gradients(kind, config, chosen):
    exact = make(kind, config).double()
    x, t = batch(config)
    truth = outcome(exact, exact.named_parameters(), x.double(), t)
    ours = outcome(fuse(exact, chosen), exact.named_parameters(), x.double(), t)
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("kind", "config", "device"),
    [pytest.param(*net, "cpu", id=name) for name, net in NETS.items()]
    + [pytest.param(UNet, UNetConfig(), "cuda", marks=pytest.mark.gpu, id="published")],
)
def test_in_bf16_it_is_as_accurate_as_the_plain_network(kind, config, device):
    """Against float64, by the tolerance rule; on a GPU in the published size and compiled."""
    torch._dynamo.reset()
    plain = make(kind, config, device)
    network = fuse(plain)
    if device == "cuda":
        network.compile(fullgraph=True)
    x, t = batch(config, 8, device)
    eager, ours = (outcome(net, plain.named_parameters(), x, t, bf16=True) for net in (plain, network))
    exact = copy.deepcopy(plain).double()
    for name, value in outcome(exact, exact.named_parameters(), x.double(), t).items():
        assert_as_accurate(ours[name], eager[name], value, name)


@pytest.mark.parametrize(("kind", "config"), EACH)
def test_no_norm_is_left_and_names_are_the_networks(kind, config):
    net = make(kind, config)
    network = fuse(net)
    assert not [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert dict(network.named_parameters()) == dict(net.named_parameters())
    assert network.state_dict().keys() == net.state_dict().keys()


def test_the_smallest_networks_program():
    """A golden text: read the difference when it changes."""
    assert program(fuse(UNet(SMALLEST))) == PROGRAM


def test_adaptive_norms_are_one_kernel_and_one_product():
    text = program(fuse(UNet(dataclasses.replace(SMALLEST, norm_conditioning=True))))
    assert text.count("project(") == 1
    assert " mul(" not in text
    adapted = [line for line in text.splitlines() if "scale=" in line]
    assert len(adapted) == 5
    assert all("group_norm_silu(" in line and "shift=" in line and "dropout_p=" in line for line in adapted)


def test_it_follows_its_networks_weights_and_a_copy_does_not():
    net = make(UNet, SMALL)
    network, (x, t) = fuse(net), batch(SMALL)
    twin, before = copy.deepcopy(network), network(x, t)
    nn.init.zeros_(net.down[0].blocks[1].norm_1.weight)
    torch.testing.assert_close(network(x, t), net(x, t))
    assert not torch.allclose(network(x, t), before)
    assert torch.equal(twin(x, t), before)


@pytest.mark.parametrize("kind", [UNet, Bottleneck])
def test_plain_and_fused_networks_draw_the_same_mask_from_a_seed(kind):
    config = dataclasses.replace(SMALL, dropout=0.3)
    net = make(kind, config).double()
    network, (x, t) = fuse(net), batch(config)
    one = torch.tensor([1])
    mine, theirs = (outcome(n, net.named_parameters(), x.double(), t, seed=one) for n in (network, net))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert not torch.allclose(network(x.double(), t, torch.tensor([2])), mine["prediction"])


def test_without_a_seed_masks_follow_the_generator_and_stop_in_evaluation():
    config = dataclasses.replace(SMALL, dropout=0.3)
    net, (x, t) = make(UNet, config), batch(config)

    def drawn(network, seed):
        torch.manual_seed(seed)
        return network(x, t)

    network = fuse(net)
    assert torch.equal(drawn(network, 1), drawn(network, 1))
    assert not torch.equal(drawn(network, 1), drawn(network, 2))
    network = fuse(net.eval())
    assert torch.equal(drawn(network, 1), drawn(network, 2))
    torch.testing.assert_close(network(x, t), net(x, t))


def test_every_dropout_is_the_norms_with_a_stream_of_its_own(monkeypatch):
    calls, real = [], kernels.group_norm_silu

    def spy(*args, **options):
        calls.append(options)
        return real(*args, **options)

    network = fuse(make(UNet, dataclasses.replace(SMALL, dropout=0.1)))
    for node in network.graph.find_nodes(op="call_function", target=real):
        node.target = spy
    network.recompile()
    network(*batch(SMALL))
    dropping = [call for call in calls if call.get("dropout_p")]
    assert len({call["stream"] for call in dropping}) == len(dropping) == len(calls)
    assert len({call["seed"].item() for call in dropping}) == 1


def test_biases_that_norms_add_stay_float32():
    net = make(UNet, SMALL)
    names = {p: name for name, p in net.named_parameters()}
    plain, ours = ({names[p] for p in half_parameters(n)} for n in (net, fuse(net)))
    layers = {name for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert plain == {f"{name}.{p}" for name in layers for p in ("weight", "bias")}
    assert ours < plain
    assert {"conv_in.bias", "down.0.blocks.0.conv_1.bias", "up.0.upsample.conv.bias"} <= plain - ours
    assert {"conv_out.bias", "time.linear_1.bias", *(f"{name}.weight" for name in layers)} <= ours


def trained_once(net, parameters, x, t):
    for p in parameters:
        p.grad = None
    net(x, t).square().mean().backward()
    return [p.grad for p in parameters]


@pytest.mark.lab
@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_no_two_parameters_share_the_memory_of_their_gradients(backend):
    """Clipping in place would scale it twice."""
    torch._dynamo.reset()
    net = make(UNet, SMALL)
    network, (x, t), parameters = fuse(net), batch(SMALL), list(net.parameters())
    call = torch.compile(network, backend=backend, fullgraph=True) if backend else network
    kept = trained_once(call, parameters, x, t)  # by backward()
    for gradients in (kept, torch.autograd.grad(call(x, t).square().mean(), parameters)):
        ranges = sorted((g.data_ptr(), g.data_ptr() + g.nbytes) for g in gradients)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


@pytest.mark.lab
@pytest.mark.parametrize(
    ("device", "backend", "blocks"),
    [
        ("cpu", "aot_eager", 1),  # graph breaks and recompiles as with Inductor, without minutes of C++ compilation
        pytest.param("cpu", "inductor", 2, marks=pytest.mark.slow),
        pytest.param("cuda", "inductor", 2, marks=pytest.mark.gpu),
    ],
)
def test_the_cifar10_network_compiles_as_one_graph_and_never_again(device, backend, blocks):
    """Forward, backward and dropout by the fused kernel, in the published size, or with one block a level."""
    torch._dynamo.reset()
    net = UNet(dataclasses.replace(PUBLISHED, blocks_per_level=blocks)).to(device)
    compiled, parameters = torch.compile(fuse(net), fullgraph=True, backend=backend), list(net.parameters())
    x, t = batch(PUBLISHED, 2, device)
    gradients = trained_once(compiled, parameters, x, t)
    assert all(g is not None and g.isfinite().all() for g in gradients)
    with torch._dynamo.config.patch(error_on_recompile=True):
        trained_once(compiled, parameters, x, t)


class Opaque(nn.Module):
    """Hides a norm from the trace: its flow depends on values."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x, t):
        return self.norm(x) if x.sum() > 0 else x


class Function(nn.Module):
    def forward(self, x, t):
        return F.group_norm(x, 2)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Opaque(), "torch.fx cannot trace Opaque .*--kernels torch"),
        (Function(), "the norm group_norm cannot be fused"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8, affine=False)), "the norm '?1'? cannot be fused"),
    ],
)
def test_what_cannot_be_fused_is_refused_by_name(net, message):
    with pytest.raises(ValueError, match=message):
        fuse(net)
    if "trace" not in message:
        assert fuse(net, [r for r in RULES if r is not fold_into_norms])


class Readers(nn.Module):
    """A sum with another reader before its norm, one with three after it, and an upsampling by three."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.norm_1, self.norm_2 = nn.GroupNorm(2, 8), nn.GroupNorm(2, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        h = self.a(x) + self.b(x)
        early = h * 2
        h = self.conv(F.interpolate(F.silu(self.norm_1(h)), scale_factor=3.0, mode="nearest"))
        y = self.norm_2(h)
        return (y + h * 3 + h.sin() + h.exp()).sum() + early.sum()


def test_sums_with_other_readers_are_theirs_too():
    net = Readers().double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    network = fuse(net)
    assert [n.target for n in network.graph.nodes if n.target is kernels.upsample_conv] == []
    results = []
    for each in (net, network):
        y = each(x)
        results.append([y, *torch.autograd.grad(y, list(net.parameters()))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_documented_rules_are_the_rules():
    documented = [line.split()[0] for line in rules.__doc__.splitlines() if line.startswith("    ")]
    assert documented == [rule.__name__ for rule in RULES]


PROGRAM = """\
v0 = seed_or_drawn(dropout_seed, x)
v1 = time(t)
v2 = silu(v1, inplace=False)
v3 = project(v2, [down.0.blocks.0.embedding.weight, middle_1.embedding.weight, middle_2.embedding.weight, up.0.blocks.0.embedding.weight, up.0.blocks.1.embedding.weight], [down.0.blocks.0.embedding.bias, middle_1.embedding.bias, middle_2.embedding.bias, up.0.blocks.0.embedding.bias, up.0.blocks.1.embedding.bias], [down.0.blocks.0.conv_1.bias, middle_1.conv_1.bias, middle_2.conv_1.bias, up.0.blocks.0.conv_1.bias, up.0.blocks.1.conv_1.bias])
v4 = conv2d(x, conv_in.weight, None, (1, 1), (1, 1), (1, 1), 1)
v5 = add_group_norm_silu(v4, down.0.blocks.0.norm_1.weight, down.0.blocks.0.norm_1.bias, 4, 1e-06, shift=conv_in.bias, activation=silu)
v6 = conv2d(v5[0], down.0.blocks.0.conv_1.weight, None, (1, 1), (1, 1), (1, 1), 1)
v7 = group_norm_silu(v6, down.0.blocks.0.norm_2.weight, down.0.blocks.0.norm_2.bias, 4, 1e-06, shift=v3[0], activation=silu, dropout_p=0.1, seed=v0, stream=0)
v8 = conv2d(v7, down.0.blocks.0.conv_2.weight, None, (1, 1), (1, 1), (1, 1), 1)
v9 = add_group_norm_silu(v5[1], middle_1.norm_1.weight, middle_1.norm_1.bias, 4, 1e-06, shift=down.0.blocks.0.conv_2.bias, activation=silu, residual=v8)
v10 = conv2d(v9[0], middle_1.conv_1.weight, None, (1, 1), (1, 1), (1, 1), 1)
v11 = group_norm_silu(v10, middle_1.norm_2.weight, middle_1.norm_2.bias, 4, 1e-06, shift=v3[1], activation=silu, dropout_p=0.1, seed=v0, stream=1)
v12 = conv2d(v11, middle_1.conv_2.weight, None, (1, 1), (1, 1), (1, 1), 1)
v13 = add_group_norm_silu(v9[2], middle_attention.norm.weight, middle_attention.norm.bias, 4, 1e-06, shift=middle_1.conv_2.bias, activation=none, residual=v12)
v14 = getattr(v13[0], shape)
v15 = getitem(v14, slice(2, None, None))
v16 = flatten(v13[0], 2)
v17 = transpose(v16, 1, 2)
v18 = unsqueeze(v17, 1)
v19 = linear_qkv(v18, middle_attention.qkv.weight, middle_attention.qkv.bias)
v20 = scaled_dot_product_attention(v19[0], v19[1], v19[2])
v21 = squeeze(v20, 1)
v22 = linear(v21, middle_attention.out.weight)
v23 = transpose(v22, 1, 2)
v24 = unflatten(v23, 2, v15)
v25 = add_group_norm_silu(v13[1], middle_2.norm_1.weight, middle_2.norm_1.bias, 4, 1e-06, shift=middle_attention.out.bias, activation=silu, residual=v24)
v26 = conv2d(v25[0], middle_2.conv_1.weight, None, (1, 1), (1, 1), (1, 1), 1)
v27 = group_norm_silu(v26, middle_2.norm_2.weight, middle_2.norm_2.bias, 4, 1e-06, shift=v3[2], activation=silu, dropout_p=0.1, seed=v0, stream=2)
v28 = conv2d(v27, middle_2.conv_2.weight, None, (1, 1), (1, 1), (1, 1), 1)
v29 = add_group_norm_silu(v25[1], up.0.blocks.0.norm_1.weight, up.0.blocks.0.norm_1.bias, 4, 1e-06, shift=middle_2.conv_2.bias, activation=silu, residual=v28, skip=v9[1])
v30 = conv2d(v29[0], up.0.blocks.0.conv_1.weight, None, (1, 1), (1, 1), (1, 1), 1)
v31 = group_norm_silu(v30, up.0.blocks.0.norm_2.weight, up.0.blocks.0.norm_2.bias, 4, 1e-06, shift=v3[3], activation=silu, dropout_p=0.1, seed=v0, stream=3)
v32 = conv2d(v29[1], up.0.blocks.0.shortcut.weight, None, (1, 1), (0, 0), (1, 1), 1)
v33 = conv2d(v31, up.0.blocks.0.conv_2.weight, None, (1, 1), (1, 1), (1, 1), 1)
v34 = add_vectors(up.0.blocks.0.shortcut.bias, up.0.blocks.0.conv_2.bias)
v35 = add_group_norm_silu(v32, up.0.blocks.1.norm_1.weight, up.0.blocks.1.norm_1.bias, 4, 1e-06, shift=v34, activation=silu, residual=v33, skip=v5[2])
v36 = conv2d(v35[0], up.0.blocks.1.conv_1.weight, None, (1, 1), (1, 1), (1, 1), 1)
v37 = group_norm_silu(v36, up.0.blocks.1.norm_2.weight, up.0.blocks.1.norm_2.bias, 4, 1e-06, shift=v3[4], activation=silu, dropout_p=0.1, seed=v0, stream=4)
v38 = conv2d(v35[1], up.0.blocks.1.shortcut.weight, None, (1, 1), (0, 0), (1, 1), 1)
v39 = conv2d(v37, up.0.blocks.1.conv_2.weight, None, (1, 1), (1, 1), (1, 1), 1)
v40 = add_vectors(up.0.blocks.1.shortcut.bias, up.0.blocks.1.conv_2.bias)
v41 = add_group_norm_silu(v38, norm_out.weight, norm_out.bias, 4, 1e-06, shift=v40, activation=silu, residual=v39)
v42 = conv_out(v41[0])
return v42
"""  # noqa: E501

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from fastdiff.nets.layers import (
    GroupNorm,
    ResidualBlock,
    TimeEmbedding,
    as_rows,
    concatenate,
    group_norm_silu,
)
from fastdiff.nets.unet import UNet, UNetConfig
from tests.numerics import assert_as_accurate

SMALL = UNetConfig(
    image_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4, dropout=0.1
)


def test_the_default_is_the_ddpm_cifar10_network():
    assert sum(p.numel() for p in UNet(UNetConfig()).parameters()) == 35_746_307


def test_an_untrained_network_puts_out_zero_and_every_parameter_gets_a_gradient_once_it_is_not():
    model = UNet(SMALL)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.0, 999.0])
    assert torch.equal(model(x, t), torch.zeros(2, 3, 8, 8))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model(x, t).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("mult", [(1,), (1, 2, 3)])
def test_any_shape_of_network_keeps_the_images_shape(mult, blocks):
    config = UNetConfig(
        image_size=12, image_channels=2, channels=4, channel_mult=mult, blocks_per_level=blocks, norm_groups=2,
        attention_resolutions=(12,),
    )  # fmt: skip
    assert UNet(config)(torch.randn(3, 2, 12, 12), torch.zeros(3)).shape == (3, 2, 12, 12)


def test_activations_and_weights_stay_channels_last():
    model = UNet(SMALL).eval()
    layouts = {}

    def watch(name):
        def hook(module, inputs, output):
            layouts[name] = output.is_contiguous(memory_format=torch.channels_last)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(watch(name))
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    model(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), torch.zeros(2))
    assert layouts
    assert all(layouts.values())


def test_the_output_depends_on_the_time_and_only_on_its_own_image():
    model = UNet(SMALL).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([10.0, 500.0, 990.0])
    with torch.no_grad():
        whole = model(x, t)
        torch.testing.assert_close(model(x[1:2], t[1:2]), whole[1:2])
        assert not torch.allclose(model(x, t + 100), whole)


def test_bf16_autocast_keeps_activations_in_bf16():
    model = UNet(SMALL).eval()
    dtypes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, o, name=name: dtypes.update({name: (i[0].dtype, o.dtype)}))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = model(torch.randn(2, 3, 8, 8), torch.zeros(2))
    assert out.dtype == torch.bfloat16
    assert {o for _, o in dtypes.values()} == {torch.bfloat16}
    assert {i for name, (i, _) in dtypes.items() if name != "conv_in"} == {torch.bfloat16}


def test_group_norm_silu_is_the_composition():
    norm = GroupNorm(4, 8, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 5, 3).to(memory_format=torch.channels_last)
    affine = norm.weight, norm.bias
    assert torch.equal(group_norm_silu(x, norm, *affine), F.silu(norm(x)))
    assert torch.equal(group_norm_silu(x, norm, *affine, silu=False), norm(x))


def test_the_time_embedding_is_ddpms():
    from diffusers.models.embeddings import get_timestep_embedding

    embedding = TimeEmbedding(32)
    seen = []
    embedding.linear_1.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    t = torch.tensor([0.0, 1.0, 500.0, 999.0])
    embedding(t)
    expected = get_timestep_embedding(t, 32, flip_sin_to_cos=False, downscale_freq_shift=1)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-4)  # float32 angles up to 1000


def fused(config=SMALL):
    model = UNet(config).use_kernels("triton")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def drawn(model, seed, x, t):
    torch.manual_seed(seed)
    return model(x, t)


def test_the_fused_networks_dropout_follows_the_generator_and_stops_in_eval():
    model, x, t = fused(), torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), torch.tensor([3.0, 700.0])
    assert torch.equal(drawn(model, 1, x, t), drawn(model, 1, x, t))
    assert not torch.equal(drawn(model, 1, x, t), drawn(model, 2, x, t))
    model.eval()
    assert torch.equal(drawn(model, 1, x, t), drawn(model, 2, x, t))
    torch.testing.assert_close(model(x, t), model.use_kernels("torch")(x, t))


def test_every_block_of_the_fused_network_drops_by_a_mask_of_its_own(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "fastdiff._kernels.group_norm_silu", lambda x, *args, **kwargs: calls.append(kwargs) or x.clone(), raising=True
    )
    fused()(torch.randn(1, 3, 8, 8), torch.zeros(1))
    dropping = [call for call in calls if call["dropout_p"] > 0]
    blocks = [m for m in fused().modules() if isinstance(m, ResidualBlock)]
    assert len(dropping) == len(blocks)
    assert {call["dropout_p"] for call in dropping} == {SMALL.dropout}
    assert len({call["stream"] for call in dropping}) == len(blocks)
    assert len({call["seed"].item() for call in dropping}) == 1


def trained_once(model, x, t):
    model.zero_grad()
    model(x, t).square().mean().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "aot_eager"),  # graph breaks and recompiles as with Inductor, without minutes of C++ compilation
        pytest.param("cpu", "inductor", marks=pytest.mark.slow),
        pytest.param("cuda", "inductor", marks=pytest.mark.gpu),
    ],
)
def test_the_cifar10_network_compiles_as_one_graph_and_never_again(device, backend):
    """Forward, backward and dropout by the fused kernel, in the published size."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = UNet(UNetConfig(dropout=0.1)).to(device).use_kernels("triton")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x, t = torch.randn(2, 3, 32, 32, device=device), torch.tensor([3.0, 700.0], device=device)
    x = x.to(memory_format=torch.channels_last)
    gradients = trained_once(compiled, x, t)
    assert all(g is not None and g.isfinite().all() for g in gradients)
    with torch._dynamo.config.patch(error_on_recompile=True):
        trained_once(compiled, x, t)


def outcome(model, x, t, *, bf16):
    """The prediction and the gradient of each weight, by name."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        y = model(x, t)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    gradients = torch.autograd.grad(y, list(model.parameters()), weight)
    return {"prediction": y, **dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))}


PLAIN = dataclasses.replace(SMALL, dropout=0.0)


@pytest.mark.parametrize(
    ("device", "config"),
    [
        pytest.param("cpu", PLAIN, id="small"),
        pytest.param("cpu", dataclasses.replace(PLAIN, attention_resolutions=()), id="without attention"),
        pytest.param("cpu", dataclasses.replace(PLAIN, attention_resolutions=(8, 4)), id="attention everywhere"),
        pytest.param(
            "cpu",
            dataclasses.replace(PLAIN, channel_mult=(2,), blocks_per_level=1, attention_resolutions=()),
            id="one level, one block",
        ),
        pytest.param("cpu", dataclasses.replace(PLAIN, channels=12, image_channels=1, norm_groups=3), id="odd widths"),
        pytest.param("cuda", UNetConfig(), marks=pytest.mark.gpu, id="published"),
    ],
)
def test_the_fused_network_is_as_accurate_as_pytorchs(device, config):
    """In bf16, on a GPU in the published size and compiled: the prediction and the gradient of every weight."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    exact = UNet(config)
    for p in exact.parameters():
        if not p.any():  # the last layers of a branch start at zero, and would hide what is before them
            torch.nn.init.normal_(p, std=0.02)
    exact = exact.to(device)
    plain, ours = copy.deepcopy(exact), copy.deepcopy(exact).use_kernels("triton")
    if device == "cuda":
        ours.compile(fullgraph=True)
    side = config.image_size
    x = torch.randn(8, config.image_channels, side, side, device=device).to(memory_format=torch.channels_last)
    t = torch.linspace(0, 999, 8, device=device)
    truth = outcome(exact.double(), x.double(), t, bf16=False)
    eager, fused_ = outcome(plain, x, t, bf16=True), outcome(ours, x, t, bf16=True)
    for name, value in truth.items():
        assert_as_accurate(fused_[name], eager[name], value, name)


def test_kernels_can_be_switched_and_copies_are_independent():
    """Every bias is added once, whichever way the network came to its kernels."""
    x, t = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), torch.tensor([3.0, 700.0])
    model = fused(PLAIN)
    twin = copy.deepcopy(model)
    assert all(part in set(twin.modules()) for part in twin.parts)
    expected = model.use_kernels("torch")(x, t)
    torch.testing.assert_close(twin(x, t), expected)
    torch.testing.assert_close(model.use_kernels("triton").use_kernels("triton")(x, t), expected)
    with torch.no_grad():
        torch.testing.assert_close(twin(x, t), expected)
        assert torch.equal(model.use_kernels("torch")(x, t), expected)


@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_no_two_parameters_share_the_memory_of_their_gradients(backend):
    """Clipping in place would scale it twice."""
    torch._dynamo.reset()
    model = fused(PLAIN)
    call = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    x, t = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), torch.tensor([3.0, 700.0])
    kept = trained_once(call, x, t)  # by backward()
    for gradients in (kept, torch.autograd.grad(call(x, t).square().mean(), list(model.parameters()))):
        ranges = sorted((g.data_ptr(), g.data_ptr() + g.nbytes) for g in gradients)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


def test_a_part_that_was_exchanged_is_used():
    model = fused(PLAIN)
    x, t = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), torch.tensor([3.0, 700.0])
    before = model(x, t)
    model.down[0].blocks[1] = copy.deepcopy(model.down[0].blocks[1])
    assert torch.equal(model(x, t), before)
    torch.nn.init.zeros_(model.down[0].blocks[1].norm_1.weight)
    assert not torch.allclose(model(x, t), before)
    torch.testing.assert_close(model(x, t), model.use_kernels("torch")(x, t))


def test_a_parameters_rows_are_summed_over_the_images():
    """In float32 in the order of the vectors, and given to each of them."""
    vectors = [
        [torch.randn(4).requires_grad_()],
        [],
        [torch.randn(2).requires_grad_(), torch.randn(3).requires_grad_()],
    ]
    rows = as_rows(vectors, 5)
    assert [[v.shape for v in group] for group in rows] == [[(5, 4)], [], [(5, 2), (5, 3)]]
    weights = [torch.randn(5, n) for n in (4, 2, 3)]
    flat, given = [v for group in rows for v in group], [v for group in vectors for v in group]
    gradients = torch.autograd.grad(flat, given, weights)
    for mine, row, vector, weight in zip(gradients, flat, given, weights, strict=True):
        assert torch.equal(row, vector.expand(5, -1))
        torch.testing.assert_close(mine, weight.sum(0))


def test_concatenation_gives_gradients_of_their_own_in_channels_last():
    parts = [torch.randn(2, c, 4, 4).to(memory_format=torch.channels_last).requires_grad_() for c in (8, 16)]
    weight = torch.randn(2, 24, 4, 4).to(memory_format=torch.channels_last)
    y = concatenate(*parts)
    assert torch.equal(y, torch.cat(parts, 1))
    gradients = torch.autograd.grad(y, parts, weight)
    assert all(torch.equal(g, w) for g, w in zip(gradients, weight.split([8, 16], 1), strict=True))
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in gradients)

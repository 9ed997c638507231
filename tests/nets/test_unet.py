from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastdiff.nets.conditions import TimeEmbedding
from fastdiff.nets.dropout import Dropout
from fastdiff.nets.unet import UNet, UNetConfig

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


def test_classes_change_nothing_until_they_are_trained_and_then_only_their_own_images():
    plain, told = UNet(SMALL).eval(), UNet(replace(SMALL, num_classes=3)).eval()
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.1)
    left = told.load_state_dict(plain.state_dict(), strict=False)
    assert left.missing_keys == ["label.weight"]
    x, t, labels = torch.randn(4, 3, 8, 8), torch.full((4,), 10.0), torch.tensor([0, 1, 1, 3])
    assert torch.equal(told(x, t, labels=labels), plain(x, t))
    told(x, t, labels=labels).square().sum().backward()
    assert [bool(row.abs().sum() > 0) for row in told.label.weight.grad] == [True, True, False, True]
    with torch.no_grad():
        told.label.weight[1] = 1.0
    same = [torch.equal(a, b) for a, b in zip(told(x, t, labels=labels), plain(x, t), strict=True)]
    assert same == [True, False, False, True]


def test_texts_change_nothing_until_they_are_trained():
    net = replace(SMALL, text_encoder="frozen", text_width=8)
    plain, told, alone = UNet(SMALL).eval(), UNet(net).eval(), UNet(replace(net, text_pooled=False))
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.1)
    left = told.load_state_dict(plain.state_dict(), strict=False)
    assert "pooled.linear.weight" in left.missing_keys
    assert not any(name.startswith("pooled.") for name in alone.state_dict())
    x, t = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), torch.tensor([10.0, 500.0])
    text, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(told(x, t, text=text, text_mask=mask), plain(x, t))
    told(x, t, text=text, text_mask=mask).square().sum().backward()
    assert told.pooled.linear.weight.grad.abs().sum() > 0


def test_a_seed_gives_a_self_attention_its_weights_before_what_reads_the_text():
    drawn = []
    for net in (SMALL, replace(SMALL, text_encoder="frozen", text_width=8, text_pooled=False)):
        torch.manual_seed(0)
        drawn.append(UNet(net).down[1].attention[0].qkv.weight)
    assert torch.equal(*drawn)  # so that a seed begins as in earlier versions


def test_a_second_time_changes_nothing_until_it_is_trained():
    plain, told = UNet(SMALL).eval(), UNet(replace(SMALL, two_times=True)).eval()
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.1)
    left = told.load_state_dict(plain.state_dict(), strict=False)
    assert {name.partition(".")[0] for name in left.missing_keys} == {"span"}
    x, t, span = torch.randn(2, 3, 8, 8), torch.full((2,), 500.0), torch.tensor([0.0, 300.0])
    assert torch.equal(told(x, t, span=span), plain(x, t))
    told(x, t, span=span).square().sum().backward()
    assert told.span.linear_2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("mult", [(1,), (1, 2, 3)])
def test_any_shape_of_network_keeps_the_images_shape(mult, blocks):
    config = UNetConfig(
        image_size=12, image_channels=2, channels=4, channel_mult=mult, blocks_per_level=blocks, norm_groups=2,
        attention_resolutions=(12,),
    )  # fmt: skip
    assert UNet(config)(torch.randn(3, 2, 12, 12), torch.zeros(3)).shape == (3, 2, 12, 12)


def test_patches_are_what_folding_pixels_into_channels_would_be():
    torch.manual_seed(0)
    patches = UNet(replace(SMALL, image_size=16, patch=2)).eval()
    folded = UNet(replace(SMALL, image_channels=12)).eval()
    for p in patches.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = patches.state_dict()
    kernel = state["conv_in.weight"].unflatten(3, (3, 2)).unflatten(2, (3, 2))  # (C, 3, 3, 2, 3, 2)
    state["conv_in.weight"] = kernel.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    folded.load_state_dict(state)
    x, t = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        theirs = F.pixel_shuffle(folded(F.pixel_unshuffle(x, 2), t), 2)
        ours = patches(x, t)
    torch.testing.assert_close(ours, theirs)
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("patch", [1, 2])
def test_activations_and_weights_stay_channels_last(patch):
    model = UNet(replace(SMALL, image_size=8 * patch, patch=patch)).eval()
    layouts = {}

    def watch(name):
        def hook(module, inputs, output):
            layouts[name] = output.is_contiguous(memory_format=torch.channels_last)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(watch(name))
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    model(torch.randn(2, 3, 8 * patch, 8 * patch).to(memory_format=torch.channels_last), torch.zeros(2))
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


def test_the_time_embedding_is_ddpms():
    from diffusers.models.embeddings import get_timestep_embedding

    embedding = TimeEmbedding(32)
    seen = []
    embedding.linear_1.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    t = torch.tensor([0.0, 1.0, 500.0, 999.0])
    embedding(t)
    expected = get_timestep_embedding(t, 32, flip_sin_to_cos=False, downscale_freq_shift=1)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-4)  # float32 angles up to 1000


def test_a_seed_fixes_the_dropout_masks_and_each_layer_has_its_own():
    model, x, t = UNet(SMALL), torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), torch.tensor([3.0, 700.0])
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    one, other = torch.tensor([1]), torch.tensor([2])
    assert torch.equal(model(x, t, one), model(x, t, dropout_seed=one))
    assert not torch.equal(model(x, t, one), model(x, t, other))
    assert not torch.equal(model(x, t), model(x, t))  # from PyTorch's generator
    assert torch.equal(model.eval()(x, t, one), model(x, t))


def test_the_masks_of_a_network_differ_and_keep_the_stated_share():
    seen = []
    model = UNet(replace(SMALL, dropout=0.25))
    layers = [m for m in model.modules() if isinstance(m, Dropout)]
    ones = torch.ones(4, 8, 16, 16)
    for layer in layers:
        seen.append(layer(ones, torch.tensor([7])))
        kept = seen[-1][seen[-1] > 0]
        assert torch.allclose(kept, torch.full_like(kept, 4 / 3))
        assert abs(kept.numel() / ones.numel() - 0.75) < 0.03
    assert len({tuple(y.flatten().tolist()) for y in seen}) == len(layers) > 2

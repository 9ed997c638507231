"""Text encoders and cross-attention: what padding, other texts and the start may not change."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdiff.errors import UserError
from fastdiff.nets.conditions import CrossAttention, PooledText
from fastdiff.nets.fuse import fuse
from fastdiff.nets.text import BEGIN, END, PAD, READERS, TextEncoder, byte_ids, word_ids

TEXTS = ["a red three", "", "ein Kätzchen 🐈", "x" * 14]


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    encoder = TextEncoder(width=32, blocks=2, heads=4)
    for block in encoder.blocks:  # which start as the identity
        for layer in (block.out, block.mlp[-1]):
            nn.init.normal_(layer.weight, std=0.1)
    return encoder


def test_ids_are_the_bytes_between_begin_and_end():
    ids = byte_ids(["aé", ""], 8)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[BEGIN, 97, 0xC3, 0xA9, END, PAD, PAD, PAD], [BEGIN, END, *[PAD] * 6]]
    assert byte_ids(["x" * 62]).shape == (1, 64)


def test_words_have_the_same_number_in_any_text_and_signs_are_words():
    ids = word_ids(["A red three", "three, RED", "", "a🐈"], 8)
    assert ids.dtype == torch.int64
    (a, red, three), (comma, cat) = ids[0, 1:4].tolist(), (ids[1, 2].item(), ids[3, 2].item())
    assert len({a, red, three, comma, cat}) == 5
    assert min(a, red, three, comma, cat) > PAD
    assert ids.tolist() == [
        [BEGIN, a, red, three, END, *[PAD] * 3],
        [BEGIN, three, comma, red, END, *[PAD] * 3],
        [BEGIN, END, *[PAD] * 6],
        [BEGIN, a, cat, END, *[PAD] * 4],
    ]
    assert ids.max() < READERS["words"][1]
    assert (red, three) == (259 + 8079, 259 + 6389)  # of every machine and version: networks are trained on them


def test_a_word_has_one_number_however_its_letters_are_put_together():
    composed, apart = "CAF\u00c9", "cafe\u0301"
    assert torch.equal(word_ids([composed]), word_ids([apart]))


def test_texts_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="has 63 words, but at most 62 fit"):
        word_ids(["so " * 63])
    with pytest.raises(UserError, match="is not valid Unicode"):
        word_ids(["\udcff"])
    with pytest.raises(UserError, match=r"'é+' has 64 bytes, but at most 62 fit"):
        byte_ids(["é" * 32])
    with pytest.raises(UserError, match="is not valid Unicode"):
        byte_ids(["\udcff"])


def test_a_token_begins_as_its_byte_and_its_place():
    encoder, ids = TextEncoder(width=32, blocks=2), byte_ids(["a red three"], 13)
    expected = encoder.norm(encoder.byte(ids) + encoder.position.weight[:13])
    assert torch.equal(encoder(ids)[0], expected)


def test_padding_and_other_texts_change_nothing(encoder):
    tokens, mask = encoder(byte_ids(TEXTS[:2], 16))
    padded, longer = encoder(byte_ids(TEXTS[:2], 64))
    assert mask.sum(1).tolist() == longer.sum(1).tolist() == [13, 2]
    torch.testing.assert_close(padded[:, :16], tokens, rtol=0, atol=1e-6)
    assert not padded[:, 16:].any()
    assert not tokens[~mask].any()
    together, _ = encoder(byte_ids(TEXTS))
    for i, text in enumerate(TEXTS):
        torch.testing.assert_close(encoder(byte_ids([text]))[0][0], together[i], rtol=0, atol=1e-6)
    assert (together[0, :13] - together[3, :13]).abs().max() > 0.1
    backwards = encoder(byte_ids(["eerht der a"]))[0]
    assert (backwards.sum(1) - together[:1].sum(1)).abs().max() > 0.01  # order matters


def test_the_gradient_reaches_the_bytes_that_occur_and_no_others(encoder):
    tokens, _ = encoder(byte_ids(["abc", "b"]))
    (tokens * torch.randn_like(tokens)).sum().backward()
    reached = encoder.byte.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert reached == [97, 98, 99, BEGIN, END]
    assert encoder.position.weight.grad.abs().sum(1).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_numbers_that_no_text_of_the_training_set_has_stay_unseen():
    encoder = TextEncoder(READERS["words"][1], width=16, blocks=0)
    encoder.begin_with(word_ids(["a red three", "a blue one"], 6))
    assert encoder.position.weight.any(1).tolist() == [True] * 6 + [False] * 58
    ids = word_ids(["a red one", "a scarlet three!"], 7)
    assert encoder.unseen(ids).tolist() == [[False] * 7, [False, False, True, False, True, False, False]]
    (encoder(ids[:1])[0] * torch.randn(1, 7, 16)).sum().backward()
    unseen = encoder.unseen(torch.arange(len(encoder.byte.weight)))
    assert encoder.byte.weight.grad[~unseen].any()
    assert not encoder.byte.weight.grad[unseen].any()


class Small(nn.Module):
    """Of the least that holds a text encoder and a cross-attention among other layers."""

    def __init__(self):
        super().__init__()
        self.text = TextEncoder(width=16, blocks=1, heads=2)
        self.conv_in, self.conv_out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.cross = CrossAttention(8, 16, heads=2, groups=4, eps=1e-6)
        self.pooled, self.norm = PooledText(16, 8), nn.GroupNorm(4, 8)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, ids):
        tokens, mask = self.text(ids)
        h = self.cross(self.conv_in(x), tokens, mask) + self.pooled(tokens, mask)[:, :, None, None]
        return self.conv_out(F.silu(self.norm(h)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    net = Small().double()
    return net, torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)


def test_cross_attention_starts_without_effect_and_then_reads_the_text(small):
    net, x = small
    ids = byte_ids(["red", "green"], 16)
    torch.testing.assert_close(net.cross(x := net.conv_in(x), net.text(ids)[0], ids != PAD), x)
    nn.init.normal_(net.cross.out.weight)
    tokens, mask = net.text(ids)
    y = net.cross(x, tokens, mask)
    assert (y - x).abs().max() > 1e-3
    longer = byte_ids(["red", "green"], 64)
    padded = net.cross(x, net.text(longer)[0], longer != PAD)
    torch.testing.assert_close(padded, y, rtol=0, atol=1e-12)
    swapped = net.cross(x.flip(0), tokens.flip(0), mask.flip(0))
    torch.testing.assert_close(swapped.flip(0), y, rtol=0, atol=1e-12)


def test_the_pooled_text_is_of_its_own_tokens_alone(small):
    net, _ = small
    texts = ["red", "a green one"]
    assert not net.pooled(*net.text(byte_ids(texts))).any()  # without effect at the start
    nn.init.normal_(net.pooled.linear.weight)
    padded = net.pooled(*net.text(byte_ids(texts, 64)))
    apart = [net.pooled(*net.text(byte_ids([text], 20))) for text in texts]
    torch.testing.assert_close(padded, torch.cat(apart), rtol=0, atol=1e-12)
    assert (padded[0] - padded[1]).abs().max() > 0.01
    tokens, mask = torch.randn(1, 4, 16).double(), torch.tensor([[True, True, False, True]])
    expected = net.pooled.linear(tokens[:, [0, 1, 3]].mean(1))
    torch.testing.assert_close(net.pooled(tokens, mask), expected, rtol=0, atol=1e-12)


def test_a_fused_network_with_text_is_the_plain_one(small):
    net, x = small
    nn.init.normal_(net.cross.out.weight)
    nn.init.normal_(net.cross.out.bias)
    nn.init.normal_(net.pooled.linear.weight)
    fused, ids = fuse(net), byte_ids(["red", "a green one"], 16)
    assert not any(isinstance(each, nn.GroupNorm) for each in fused.modules())

    def outcome(network):
        y = network(x, ids)
        return y, *torch.autograd.grad((y**2).sum(), list(net.parameters()))

    for ours, plain in zip(outcome(fused), outcome(net), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    other = copy.deepcopy(net)
    other.load_state_dict(fused.state_dict())

"""Frozen text encoders. Those of packages are skipped where the package is not installed."""

import importlib.util
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff.errors import UserError
from fastdiff.nets import frozen_text
from fastdiff.nets.frozen_text import frozen_encoder, text_table

TEXTS = ["a red three", "", "a green seven on a white background", "ein Kätzchen 🐈"]


def needs(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def check(encoder):
    """What any frozen encoder promises."""
    tokens, mask = encoder.encode(TEXTS)
    assert tokens.shape == (4, mask.shape[1], encoder.width)
    assert mask.dtype == torch.bool
    assert mask[:, 0].all()
    assert not tokens[~mask].any()
    assert tokens.isfinite().all()
    for i, text in enumerate(TEXTS):
        alone, own = encoder.encode([text])
        assert own.sum() == mask[i].sum()
        torch.testing.assert_close(alone[own], tokens[i][mask[i]], rtol=1e-4, atol=1e-5)
    assert (encoder.encode(["a three red"])[0] - encoder.encode(["a red three"])[0]).abs().max() > 0.01
    with pytest.raises(UserError, match="tokens, but at most"):
        encoder.encode(["word " * 200])
    with pytest.raises(UserError, match="not valid Unicode"):
        encoder.encode(["\udcff"])


@needs("wordllama")
def test_wordllama():
    encoder = frozen_encoder("wordllama")
    check(encoder)
    assert encoder.width == 256
    assert encoder.fingerprint == frozen_encoder("wordllama").fingerprint

    def direction(word):
        return encoder.encode([word])[0][0, 1:].mean(0) - encoder.encode(["the"])[0][0, 1:].mean(0)

    cat, kitten, tax = (direction(word) for word in ("cat", "cats", "tax"))
    assert torch.cosine_similarity(cat, kitten, 0) > torch.cosine_similarity(cat, tax, 0) + 0.1


def save_model(folder, kind):
    """A tiny encoder with random weights, and a tokenizer of bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    n = len(vocabulary)
    if kind == "clip":
        config = transformers.CLIPTextConfig(
            vocab_size=n, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=77, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        transformers.CLIPTextModel(config).save_pretrained(folder)
    else:
        config = transformers.T5Config(vocab_size=n, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.mark.lab
@needs("transformers")
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_transformers(tmp_path, kind):
    first, second = (frozen_encoder(f"transformers:{save_model(tmp_path / name, kind)}") for name in ("a", "b"))
    check(first)
    assert first.width == 16
    assert first.fingerprint == second.fingerprint
    weights = tmp_path / "b" / "model.safetensors"
    tensors = load_file(weights)
    lost = sorted(tensors)[-1]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"it has no weights .*weight"):  # which would else be random
        frozen_encoder(f"transformers:{tmp_path / 'b'}")
    weights.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"b cannot be loaded as a CLIP text model or a T5 encoder: .+"):
        frozen_encoder(f"transformers:{tmp_path / 'b'}")
    (tmp_path / "b" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="it is of kind 'bert'"):
        frozen_encoder(f"transformers:{tmp_path / 'b'}")


def test_names_and_packages_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'clip' is not known; choose bytes, words, wordllama or transformers:PATH"):
        frozen_encoder("clip")
    with pytest.raises(UserError, match=r"has no config\.json"):
        frozen_encoder(f"transformers:{tmp_path}")
    with pytest.raises(UserError, match="~nobody-of-this-name/clip: no folder is known for its ~"):
        frozen_encoder("transformers:~nobody-of-this-name/clip")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package wordllama, which is not installed: run `uv sync --extra"):
        frozen_encoder("wordllama")


class Lengths:
    """Tokens that say the text's length and place, and which texts were encoded."""

    width, fingerprint = 2, "lengths-1"

    def __init__(self):
        self.calls = []

    def encode(self, texts):
        self.calls += texts
        longest = max(map(len, texts)) + 1
        mask = torch.arange(longest) <= torch.tensor(list(map(len, texts)))[:, None]
        tokens = torch.stack([torch.tensor([[len(text), i] for i in range(longest)]) for text in texts])
        return tokens * mask[..., None] / 2, mask


def test_texts_are_encoded_once_and_then_read_from_the_cache(tmp_path, caplog):
    encoder = Lengths()
    texts = ["bb", "a", "bb", "dddd", "ccc"]
    for _ in range(2):
        table = text_table(encoder, texts, tmp_path, batch_size=2)
        assert table.row == {"": 0, "a": 1, "bb": 2, "ccc": 3, "dddd": 4}
        assert table.tokens.dtype == torch.float16
        assert table.tokens.shape == (5, 5, 2)
        assert table.tokens[2].tolist() == [[1, 0], [1, 0.5], [1, 1], [0, 0], [0, 0]]
        assert table.mask.sum(1).tolist() == [1, 2, 3, 4, 5]
    assert encoder.calls == ["", "a", "bb", "ccc", "dddd"]
    text_table(encoder, [*texts, "e"], tmp_path)
    assert len(encoder.calls) == 11  # other texts
    encoder.fingerprint = "lengths-2"
    text_table(encoder, texts, tmp_path)
    assert len(encoder.calls) == 16  # another encoder
    stored = list(tmp_path.iterdir())
    assert len(stored) == 3
    for path in stored:
        path.write_bytes(path.read_bytes()[:99])
    with caplog.at_level(logging.WARNING):
        text_table(encoder, texts, tmp_path)
    assert "is damaged" in caplog.text
    assert text_table(encoder, texts, None).mask.shape == (5, 5)


def test_tokens_that_float16_cannot_hold_are_refused(monkeypatch, tmp_path):
    encoder = Lengths()
    monkeypatch.setattr(
        encoder, "encode", lambda texts: (torch.full((len(texts), 1, 2), 1e6), torch.ones(len(texts), 1))
    )
    with pytest.raises(UserError, match="tokens of lengths are beyond the range of float16"):
        frozen_text.text_table(encoder, ["a"], tmp_path)
    assert not list(tmp_path.iterdir())

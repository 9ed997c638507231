"""Frozen text encoders from packages or folders on the disk, and the tokens of many texts, computed once and cached."""

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastdiff.data.cache import Arrays, cached_arrays
from fastdiff.data.datasets import expanded
from fastdiff.errors import UserError
from fastdiff.nets.text import POSITIONS, check_length, check_unicode

MODELS = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}  # of transformers


class FrozenEncoder(Protocol):
    """What turns texts into tokens.

    Attributes:
        width: D, of each token.
        fingerprint: equal where equal texts give equal tokens.
    """

    width: int
    fingerprint: str

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens (N, L, D), floating point, and mask (N, L), bool; L suffices for the longest.

        Raises:
            UserError: a text is too long, or UTF-8 cannot hold it.
        """
        ...


def frozen_encoder(name: str) -> FrozenEncoder:
    """`wordllama`, or `transformers:PATH` for the folder of a CLIP or T5 encoder.

    Raises:
        UserError: another name, a package that is missing, or a folder that does not hold such an encoder.
    """
    if name == "wordllama":
        return WordLlama()
    kind, _, path = name.partition(":")
    if kind == "transformers" and path:
        return Transformers(expanded(path))
    raise UserError(f"text encoder {name!r} is not known; choose bytes, words, wordllama or transformers:PATH")


class WordLlama:
    """The embeddings of 32,000 tokens that the package wordllama ships, made from a large language model's.

    They carry no order, so a sinusoid of the position, of the same size, is added.
    """

    def __init__(self) -> None:
        spec = _package("wordllama")
        from safetensors.numpy import load_file

        folder = Path(next(iter(spec.submodule_search_locations)))
        weights = folder / "weights" / "l2_supercat_256.safetensors"
        tokenizer = folder / "tokenizers" / "l2_supercat_tokenizer_config.json"
        table = torch.from_numpy(load_file(weights)["embedding.weight"].astype(np.float32))
        self.table = table / table.std()
        self.width = self.table.shape[1]
        self.tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(tokenizer))
        self.fingerprint = f"wordllama-{_sha256([weights, tokenizer])}"

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """See FrozenEncoder."""
        rows = [torch.tensor(self.tokenizer.encode(check_unicode(text)).ids) for text in texts]  # each begins with <s>
        for text, row in zip(texts, rows, strict=True):
            check_length(text, len(row), POSITIONS, "tokens")
        padded = pad_sequence(rows, batch_first=True, padding_value=-1)
        mask, longest = padded >= 0, padded.shape[1]
        return (self.table[padded.clamp(min=0)] + _sinusoid(longest, self.width)) * mask[..., None], mask


class Transformers:
    """The last hidden states of a CLIP text model or a T5 encoder in a local folder of the package transformers."""

    def __init__(self, path: Path) -> None:
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json; expected the folder of a CLIP text model or a T5 encoder")
        _package("transformers")
        transformers: Any = importlib.import_module("transformers")
        try:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
            if config.model_type not in MODELS:
                raise ValueError(f"it is of kind {config.model_type!r}, not {', '.join(MODELS)}")
            kind = getattr(transformers, MODELS[config.model_type])
            model, found = kind.from_pretrained(path, local_files_only=True, output_loading_info=True)
            if missing := sorted(found["missing_keys"]):
                raise ValueError(f"it has no weights {missing[0]}")  # which would be drawn at random
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # the libraries below raise their own kinds on damaged files
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(f"{path} cannot be loaded as a CLIP text model or a T5 encoder: {reason}") from error
        self.model = model.eval().requires_grad_(False)
        self.width = model.config.hidden_size
        self.longest = min(getattr(model.config, "max_position_embeddings", 2 * POSITIONS), 2 * POSITIONS)
        self.fingerprint = f"transformers-{_sha256(path.iterdir())}"

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """See FrozenEncoder."""
        batch = self.tokenizer(list(map(check_unicode, texts)), padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        for text, length in zip(texts, mask.sum(1).tolist(), strict=True):
            check_length(text, length, self.longest, "tokens")
        tokens = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        return tokens * mask[..., None], mask


@dataclass(frozen=True, eq=False)
class TextTable:
    """The tokens of many texts; row 0 is the empty text, the null caption."""

    tokens: Tensor  # float16 (M, L, D), 0 at padding
    mask: Tensor  # bool (M, L)
    row: dict[str, int]  # of each text


def text_table(encoder: FrozenEncoder, texts: Iterable[str], cache: Path | None, *, batch_size: int = 256) -> TextTable:
    """Encode each text once, or read what an earlier run stored for the same encoder and texts.

    Raises:
        UserError: as `encoder.encode`, or tokens that float16 cannot hold.
    """
    distinct = ["", *sorted(set(texts) - {""})]

    def build() -> Arrays:
        parts = [encoder.encode(distinct[i : i + batch_size]) for i in range(0, len(distinct), batch_size)]
        tokens, mask = (
            pad_sequence([row for part in each for row in part], batch_first=True) for each in zip(*parts, strict=True)
        )
        tokens = tokens.detach().half()
        if not tokens.isfinite().all():
            raise UserError(f"tokens of {encoder.fingerprint.partition('-')[0]} are beyond the range of float16")
        return {"tokens": tokens.numpy(), "mask": mask.numpy()}

    digest = hashlib.sha256(json.dumps([encoder.fingerprint, distinct]).encode()).hexdigest()
    arrays = cached_arrays(None if cache is None else cache / f"text-{digest[:32]}.npz", build)
    tokens, mask = (torch.from_numpy(arrays[name]) for name in ("tokens", "mask"))
    return TextTable(tokens, mask, {text: i for i, text in enumerate(distinct)})


def _package(name: str) -> Any:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise UserError(
            f"the text encoder needs the package {name}, which is not installed: run `uv sync --extra {name}`, or "
            f"`pip install {name}`"
        )
    return spec


def _sinusoid(length: int, width: int) -> Tensor:
    """(length, width), of variance 1 (Vaswani et al. 2017, section 3.5)."""
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(width // 2) / (width // 2))
    return 2**0.5 * torch.cat([angle.sin(), angle.cos()], 1)


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()

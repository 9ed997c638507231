"""Text for a network: the encoder of bytes or words that is trained with it, and what every encoder checks.

An encoder turns N texts into tokens (N, L, D) and a mask (N, L), true where a token is one. The empty text is the null
caption of classifier-free guidance; it has tokens too, so that no row of an attention is without a key.
"""

import re
import unicodedata
import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.nets.conditions import merge_heads, split_heads
from fastdiff.nets.layers import zeroed

POSITIONS = 64  # begin, at most 62 bytes or words, end
BEGIN, END, PAD = 256, 257, 258  # after the bytes; words follow
WORDS = 8192  # numbers of words


def byte_ids(texts: Sequence[str], length: int = POSITIONS) -> Tensor:
    """Begin, the bytes of the text's UTF-8, end, padding: int64 (N, length).

    Raises:
        UserError: a text has over length - 2 bytes, or UTF-8 cannot hold it; names it.
    """
    return _ids(texts, [list(check_unicode(text).encode()) for text in texts], length, "bytes")


def split_words(text: str) -> list[str]:
    """The words and signs of a text, in small letters."""
    return re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFC", check_unicode(text).lower()))


def word_ids(texts: Sequence[str], length: int = POSITIONS) -> Tensor:
    """Begin, a number for each word and each sign, end, padding: int64 (N, length).

    A number is the hash of a word in small letters: no vocabulary is kept. Of 1,000 words 11% share theirs.

    Raises:
        UserError: a text has over length - 2 words, or UTF-8 cannot hold it; names it.
    """
    numbers = [[PAD + 1 + zlib.crc32(word.encode()) % WORDS for word in split_words(text)] for text in texts]
    return _ids(texts, numbers, length, "words")


def _ids(texts: Sequence[str], numbers: list[list[int]], length: int, unit: str) -> Tensor:
    ids = torch.full((len(texts), length), PAD)
    for row, text, content in zip(ids, texts, numbers, strict=True):
        check_length(text, len(content), length - 2, unit)
        row[: len(content) + 2] = torch.tensor([BEGIN, *content, END])
    return ids


# What is read, by the name of --text: texts -> ids, and how many ids there are.
READERS: dict[str, tuple[Callable[[Sequence[str]], Tensor], int]] = {
    "bytes": (byte_ids, PAD + 1),
    "words": (word_ids, PAD + 1 + WORDS),
}


def check_unicode(text: str) -> str:
    """The text; a UserError if it holds what is no character, as a command line's invalid UTF-8 becomes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text {text!r} is not valid Unicode; write it in UTF-8") from error
    return text


def check_length(text: str, length: int, longest: int, unit: str) -> None:
    """A UserError if the text is too long."""
    if length > longest:
        raise UserError(f"the text {text!r} has {length} {unit}, but at most {longest} fit; shorten it")


class TextEncoder(nn.Module):
    """A small transformer over bytes or words, trained with the network.

    Args:
        ids: how many there are, of bytes or words.
        width: of the tokens; a multiple of `heads`.
        blocks: pre-norm transformer blocks; 0: a token says its own byte or word and where it stands, nothing else.
        heads: of each attention.
    """

    def __init__(self, ids: int = PAD + 1, width: int = 256, blocks: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.byte = nn.Embedding(ids, width)  # or word
        self.position = nn.Embedding(POSITIONS, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.position.weight, std=0.5)  # less than the other: a token begins as its byte or word

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (N, L) int64, as by READERS, L at most 64 -> tokens (N, L, D), 0 at padding, and mask (N, L)."""
        mask = ids != PAD
        h = self.byte(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            h = block(h, mask)
        return self.norm(h) * mask[..., None], mask

    @torch.no_grad()
    def begin_with(self, ids: Tensor) -> None:
        """Zero the embedding of every id and every position that `ids` (N, L), the training captions, do not have."""
        others = torch.ones(len(self.byte.weight), dtype=torch.bool, device=ids.device)
        others[ids.flatten()] = False
        self.byte.weight[others] = 0.0
        self.position.weight[ids.shape[1] :] = 0.0

    def unseen(self, ids: Tensor) -> Tensor:
        """Which numbers no text had in training, so that their vectors stayed at 0: bool, as `ids`."""
        return ~self.byte(ids).any(-1)


class Block(nn.Module):
    """h + attention(norm(h)), then h + MLP(norm(h)): (N, L, D) -> (N, L, D). It starts as the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), zeroed(nn.Linear(width, width))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), zeroed(nn.Linear(4 * width, width)))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """mask (N, L): the positions to attend to."""
        q, k, v = (split_heads(each, self.heads) for each in self.qkv(self.norm_1(h)).chunk(3, -1))
        h = h + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, mask[:, None, None])))
        return h + self.mlp(self.norm_2(h))

"""Text for a network: the encoder of bytes that is trained with it, and what every encoder checks.

An encoder turns N texts into tokens (N, L, D) and a mask (N, L), true where a token is one. The empty text is the null
caption of classifier-free guidance; it has tokens too, so that no row of an attention is without a key.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.nets.layers import merge_heads, split_heads

POSITIONS = 64  # of the byte encoder: begin, at most 62 bytes, end
BEGIN, END, PAD = 256, 257, 258


def byte_ids(texts: Sequence[str], length: int = POSITIONS) -> Tensor:
    """Begin, the bytes of the text's UTF-8, end, padding: int64 (N, length).

    Raises:
        UserError: a text has over length - 2 bytes, or UTF-8 cannot hold it; names it.
    """
    ids = torch.full((len(texts), length), PAD)
    for row, text in zip(ids, texts, strict=True):
        content = check_unicode(text).encode()
        check_length(text, len(content), length - 2, "bytes")
        row[: len(content) + 2] = torch.tensor([BEGIN, *content, END])
    return ids


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


class ByteEncoder(nn.Module):
    """A small transformer over bytes, trained with the network: no vocabulary, so no word is unknown.

    Args:
        width: of the tokens; a multiple of `heads`.
        blocks: pre-norm transformer blocks.
        heads: of each attention.
    """

    def __init__(self, width: int = 256, blocks: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.byte = nn.Embedding(PAD + 1, width)
        self.position = nn.Embedding(POSITIONS, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        for table in (self.byte, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (N, L) int64, as by `byte_ids`, L at most 64 -> tokens (N, L, D), 0 at padding, and mask (N, L)."""
        mask = ids != PAD
        h = self.byte(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            h = block(h, mask)
        return self.norm(h) * mask[..., None], mask


class Block(nn.Module):
    """h + attention(norm(h)), then h + MLP(norm(h)): (N, L, D) -> (N, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """mask (N, L): the positions to attend to."""
        q, k, v = (split_heads(each, self.heads) for each in self.qkv(self.norm_1(h)).chunk(3, -1))
        h = h + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, mask[:, None, None])))
        return h + self.mlp(self.norm_2(h))

"""Texts as what a run's network is given."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from fastdiff.config import Config
from fastdiff.errors import UserError
from fastdiff.nets.frozen_text import frozen_encoder, text_table
from fastdiff.nets.text import PAD, READERS

Texts = Callable[[list[str]], dict[str, Tensor]]  # n texts -> n rows of each argument


def text_reader(config: Config, cache: Path | None) -> Texts | None:
    """What turns texts into the network's arguments; None for a network without text.

    Tokens of a frozen encoder are kept in the folder `cache`, if any.

    Returns:
        A function of texts. For --text bytes and words it gives `text`, int64 (n, L), which the network's own encoder
        reads; else `text`, float16 (n, L, D), and `text_mask`, bool (n, L). L is the longest text's: more positions
        would cost time and change no result.

    Raises:
        UserError: an encoder that cannot be had, or has changed; the function, for a text that is too long.
    """
    if config.net.text_encoder == "none":
        return None
    if config.net.text_encoder in READERS:
        ids_of, _ = READERS[config.net.text_encoder]

        def read_ids(texts: list[str]) -> dict[str, Tensor]:
            ids = ids_of(texts)
            return {"text": ids[:, : int((ids != PAD).sum(1).max())]}

        return read_ids
    name, known = config.conditions.text, config.conditions.text_fingerprint
    encoder = frozen_encoder(name)
    if known not in ("", encoder.fingerprint):
        raise UserError(f"--text {name} is now another encoder than the network was trained with; restore it.")

    def read(texts: list[str]) -> dict[str, Tensor]:
        table = text_table(encoder, texts, cache)
        rows = [table.row[text] for text in texts]
        return {"text": table.tokens[rows], "text_mask": table.mask[rows]}

    return read

"""What the flags of `sample` ask for: classes or prompts, and how many images of each."""

import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import UsageError, UserError
from fastdiff.evaluation.evaluate import Trained
from fastdiff.evaluation.graph_loop import Conditions
from fastdiff.evaluation.wishes import parse_classes
from fastdiff.flags import Sample
from fastdiff.nets.text import split_words
from fastdiff.runs.texts import text_reader


def asked_for(flags: Sample, trained: Trained) -> tuple[Conditions, Sequence[str], dict[str, np.ndarray]]:
    """What to draw, a row for each class or prompt: the network's conditions, their names, and arrays that say it.

    Nothing for a network without classes and texts, or for one with texts but no prompt.
    """
    names, prompts = trained.config.conditions.class_names, _prompts(flags)
    if prompts and flags.classes:
        raise UsageError("--prompt and --classes are both given; drop one of them.")
    if prompts:
        read = text_reader(trained.config, None)  # few texts, which no cache need keep
        if read is None:
            raise UsageError(f"--prompt {prompts[0]!r}: this network reads no texts; train one with --text words.")
        try:
            found = read(prompts)
        except UserError as error:
            raise UsageError(f"--prompt: {error}") from error
        _tell_unseen(prompts, found["text"], trained)
        return found, prompts, {"prompts": np.array(prompts)}
    labels = parse_classes(flags.classes, names) or (list(range(len(names))) if trained.read is None else [])
    if not labels:
        return {}, (), {}
    return {"labels": torch.tensor(labels)}, [names[label] for label in labels], {"labels": np.array(labels)}


def _tell_unseen(prompts: Sequence[str], ids: Tensor, trained: Trained) -> None:
    """Warn of words that no caption had in training; of those that share their number with one, it cannot."""
    encoder = trained.model.text
    if encoder is None or trained.config.net.text_encoder != "words":
        return
    unseen, words = encoder.unseen(ids.to(encoder.byte.weight.device))[:, 1:], list[str]()  # without the begin
    for text, new in zip(prompts, unseen.tolist(), strict=True):
        words += [word for word, is_new in zip(split_words(text), new, strict=False) if is_new]
    if words:
        listed = ", ".join(map(repr, dict.fromkeys(words)))
        print(f"warning: no caption in training had {listed}; the network knows nothing of it", file=sys.stderr)


def _prompts(flags: Sample) -> list[str]:
    """The prompts of the flag and of the file. Raises UsageError for an empty one, or a file that cannot be read."""
    prompts = list(flags.prompt)
    if flags.prompt_file is not None:
        try:
            prompts += flags.prompt_file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompt-file {flags.prompt_file} cannot be read as UTF-8 text ({error}).") from error
        if not prompts:
            raise UsageError(f"--prompt-file {flags.prompt_file} holds no prompt; write one a line.")
    for i, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UsageError(f"prompt {i} of {len(prompts)} is empty; say what the picture shows, or remove it.")
    return prompts


def shares_of(flags: Sample, rows: int) -> list[int]:
    """How many images to draw for each of the rows; for a network that is asked for nothing, of all."""
    per_class, n = flags.per_class, flags.n
    if per_class is not None and (n is not None or not rows):
        reason = "--n is given as well; drop one of them" if rows else "no class and no prompt is asked for; use --n"
        raise UsageError(f"--per-class {per_class}: {reason}.")
    for flag, value in (("--per-class", per_class), ("--n", n)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} is {value}, but must be at least 1.")
    several = len(flags.steps) > 1
    if not rows:
        return [n or (8 if several else 64)]
    # Else n is shared out evenly.
    return [per_class or (1 if several else 8)] * rows if n is None else [len(range(i, n, rows)) for i in range(rows)]

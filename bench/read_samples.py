"""How many samples show what was asked for, of runs on `digits` and `digits-captioned`.

    python bench/read_samples.py working/1 --guidance 1 2 3

scikit-learn's SVC(gamma=0.001), fitted to all of its digits, reads digits, reduced to its 8x8; colours and places are
measured. Captions of pairs of digit and colour that training saw, and of those that it never saw, have rows of their
own, each beside a row of real pictures: what the readers reach at most.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import tyro

from fastdiff.cli import run_command
from fastdiff.data.datasets import load_dataset
from fastdiff.errors import UsageError
from fastdiff.evaluation.attributes import agreement, read_digits
from fastdiff.evaluation.evaluate import Trained, load_trained
from fastdiff.evaluation.generate import Conditions, SamplerSettings
from fastdiff.evaluation.wishes import balanced
from fastdiff.model_sections import Guidance
from fastdiff.runtime.device import resolve_device, set_backends
from fastdiff.sections import SamplerName
from fastdiff.words import counted

Draw = Callable[[Conditions, float], np.ndarray]  # conditions and w -> uint8 (n, H, W, 3)
Read = dict[str, float]  # share of pictures that show what was asked for, by what was asked


def main(
    checkpoint: Annotated[Path, tyro.conf.Positional], /, guidance: tuple[float, ...] = (3.0,), n: int = 200,
    sampler: SamplerName = "ddim", steps: int = 20, last_level: float | None = None, seed: int = 0,
) -> int:  # fmt: skip
    """Print the share of samples that are read as what was asked for.

    Args:
        checkpoint: a run, or one of its checkpoints.
        guidance: weights w; see `python -m fastdiff sample --help`.
        n: samples of each row.
        sampler: how they are drawn.
        steps: of the sampler.
        last_level: of the sampler consistency; by default the run's.
        seed: of the noise and of the captions.
    """
    device = resolve_device("auto")
    set_backends(device)
    trained = load_trained(checkpoint, device=device)
    settings = SamplerSettings(sampler, steps, last_level=last_level or trained.config.tuning.last_level)
    generator = trained.generator(settings, batch_size=min(n, 256), device=device)

    def draw(conditions: Conditions, w: float) -> np.ndarray:
        drawn = list(generator.batches(n, seed=seed, conditions=conditions, guidance=Guidance(w)))
        return torch.cat(drawn).permute(0, 2, 3, 1).cpu().numpy()

    if trained.config.conditions.class_names == tuple("0123456789"):
        rows = digit_rows(draw, guidance, n)
    elif trained.read is not None and trained.config.images.data == "digits-captioned":
        rows = caption_rows(draw, guidance, n, trained, seed)
    else:
        raise UsageError(f"{trained.path} was not trained on digits with classes, nor on digits-captioned with text.")
    print(f"{trained.path}: {counted(n, 'sample')} a row by {sampler} in {counted(steps, 'step')}\n")
    for i, (name, read) in enumerate(rows):
        if i == 0:
            print(f"| | {' | '.join(read)} |\n|---|{'---:|' * len(read)}")
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in read.values())} |", flush=True)
    return 0


def digit_rows(draw: Draw, guidance: Sequence[float], n: int) -> Iterator[tuple[str, Read]]:
    """As many samples of each digit, for each w."""
    asked = balanced(n, 10)
    for w in guidance:
        grey = draw(asked, w).mean(-1, dtype=np.float32) / 255
        yield f"w = {w:g}", {"digit": float((read_digits(grey) == asked["labels"].numpy()).mean())}


def caption_rows(
    draw: Draw, guidance: Sequence[float], n: int, trained: Trained, seed: int
) -> Iterator[tuple[str, Read]]:
    """Captions that name all attributes, of pairs that training saw and of pairs that it did not, for each w."""
    assert trained.read is not None
    size = trained.config.net.image_size
    sets = {split: load_dataset("digits-captioned", split=split, image_size=size) for split in ("train", "test")}
    if trained.saved.get("data_sha256", sets["train"].sha256) != sets["train"].sha256:
        raise UsageError(f"{trained.path} was trained on digits-captioned of another version; use that version.")
    for pairs, data in zip(("seen", "never seen"), sets.values(), strict=True):
        assert data.captions is not None
        chosen = np.random.default_rng(seed).choice(len(data.images), n, replace=False)
        prompts = [data.captions[i][3] for i in chosen]
        yield f"{pairs}, real pictures", agreement(data.images[chosen], prompts)
        asked = trained.read(prompts)
        for w in guidance:
            yield f"{pairs}, w = {w:g}", agreement(draw(asked, w), prompts)


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main)))

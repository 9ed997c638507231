"""How many digits of a conditional run on `digits` are read as the digit that was asked for.

    python bench/read_digits.py working/1 --guidance 3

The reader is scikit-learn's SVC(gamma=0.001), fitted to all of its digits; samples are reduced to its 8x8.
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from fastdiff.cli import run_command
from fastdiff.sections import SamplerName


def main(
    checkpoint: Annotated[Path, tyro.conf.Positional], /, guidance: float = 3.0, n: int = 200,
    sampler: SamplerName = "ddim", steps: int = 20, seed: int = 0,
) -> int:  # fmt: skip
    """Print the share of samples that are read right.

    Args:
        checkpoint: a run, or one of its checkpoints.
        guidance: w; see `python -m fastdiff sample --help`.
        n: samples, as many of each digit.
        sampler: how they are drawn.
        steps: of the sampler.
        seed: of the noise.
    """
    import numpy as np
    import torch

    from fastdiff.errors import UsageError
    from fastdiff.evaluation.attributes import read_digits
    from fastdiff.evaluation.evaluate import load_trained
    from fastdiff.evaluation.generate import SamplerSettings
    from fastdiff.evaluation.wishes import balanced
    from fastdiff.model_sections import Guidance
    from fastdiff.runtime.device import resolve_device, set_backends

    device = resolve_device("auto")
    set_backends(device)
    trained = load_trained(checkpoint, device=device)
    if trained.config.conditions.class_names != tuple("0123456789"):
        raise UsageError(f"{trained.path} was not trained on the ten digits; use a run of --preset quick.")
    generator = trained.generator(SamplerSettings(sampler, steps), batch_size=256, device=device)
    asked = balanced(n, 10)
    images = torch.cat(list(generator.batches(n, seed=seed, conditions=asked, guidance=Guidance(guidance))))
    grey = images.permute(0, 2, 3, 1).cpu().numpy().mean(-1, dtype=np.float32) / 255
    share = (read_digits(grey) == asked["labels"].numpy()).mean()
    print(f"{share:.1%} of {n} samples at w = {guidance:g} are read as the digit asked for ({trained.path})")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main)))

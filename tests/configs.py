"""Small configs that tests train, and the flags that make them."""

from pathlib import Path

import numpy as np

from fastdiff.config import SECTIONS, Config
from fastdiff.model_sections import UNetConfig

REPO = Path(__file__).resolve().parent.parent
TINY = UNetConfig(image_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4, dropout=0.1)

BY_DATA = (  # which no flag sets
    *("num_classes", "class_names", "text_encoder", "text_fingerprint", "two_times"),
    *("latent_mean", "latent_std", "autoencoder_sha256", *SECTIONS["autoencoder"]),
)


def small_config(folder: Path, root: Path | str = "working", **changes) -> Config:
    """A run of 30 steps over the 50 smooth images of `folder`, in batches of 8: an epoch ends within the 7th step."""
    path = folder / "images.npz"
    if not path.exists():
        coarse = np.random.default_rng(0).integers(0, 256, (50, 2, 2, 3), dtype=np.uint8)
        np.savez(path, images=coarse.repeat(4, 1).repeat(4, 2))
    config = Config.of(
        data=str(path), data_root=str(folder / "data"), net=TINY, timesteps=100, batch_size=8, lr=1e-3, warmup_steps=5,
        ema_decay=0.9, steps=30, device="cpu", log_every=10, save_every=10, eval_every=1000, keep_last=10,
        run_root=str(folder / root), features="none", eval_batch_size=4, eval_steps=2, grid_samples=4,
    )  # fmt: skip
    return config.replace(**changes)


def flags_of(config):
    """The flags of `train_cifar.py` that make a config."""
    flags = []
    for name, value in config.flat().items():
        if name in ("preset", *BY_DATA) or value is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return flags

"""The autoencoder of a run that works in latents, known by its weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import require
from fastdiff.config import Config
from fastdiff.errors import UserError
from fastdiff.interop_autoencoder import TinyAutoencoder, is_autoencoder, read_autoencoder
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.nets.autoencoder import Autoencoder
from fastdiff.runs.weights import read_trained


@dataclass(frozen=True)
class AutoencoderWeights:
    """A trained autoencoder.

    Attributes:
        config: its shape.
        state: its weights, on the CPU.
        pixels: height and width of the images that it was trained on; 0 if it does not say.
        path: where it lies.
        sha256: of its weights.
        tiny: the settings of diffusers' AutoencoderTiny, if it is one.
    """

    config: AutoencoderConfig
    state: dict[str, Tensor]
    pixels: int
    path: str
    sha256: str
    tiny: dict[str, Any] | None = None

    @property
    def saved(self) -> dict[str, str]:
        """What a checkpoint keeps of it."""
        return {"autoencoder_path": self.path}

    def make(self, device: torch.device) -> Autoencoder | TinyAutoencoder:
        """The network, in eval mode, its weights fixed. Raises UserError for a tiny one where diffusers is missing."""
        if self.tiny is not None:
            model = TinyAutoencoder(self.config, self.tiny, self.state)
        else:
            model = Autoencoder(self.config)
            model.load_state_dict(self.state)
        return model.to(device).eval().requires_grad_(False)


def autoencoder_weights(
    config: Config, saved: Mapping[str, Any], *, moved: Path | None = None
) -> AutoencoderWeights | None:
    """The autoencoder that `--latents` names, if it names one.

    Args:
        saved: the state of the checkpoint to go on from, or to draw from, which knows where it lay; {} for a new run.
        moved: where it lies now.

    Raises:
        UserError: it cannot be read, or is another one than before.
    """
    named, known = config.space.latents, config.space.autoencoder_sha256
    if named is None:
        if moved is not None:
            raise UserError(f"--autoencoder {moved} would decode nothing: this network draws pixels; drop it.")
        return None
    if saved and moved is None and named == Config.from_dict(saved["config"]).space.latents:
        named = saved.get("autoencoder_path", named)
    path = Path(moved or named).expanduser()
    flag = f"--{'latents' if moved is None else 'autoencoder'} {path}"
    if not path.exists():
        place = "--latents" if moved is None and not saved else "--autoencoder, or --latents to go on training,"
        raise UserError(f"{flag} is not there; if the autoencoder has moved, add {place} and its new place.")
    if is_autoencoder(path):
        found = read_autoencoder(path)
        ours, state, pixels, where, tiny = found.config, found.state, found.pixels, path, found.tiny
    else:
        trained = read_trained(path)
        ours, state, pixels, where = trained.config.autoencoder, trained.state, trained.config.pixels, trained.path
        tiny = None
        if ours.factor == 0:
            raise UserError(
                f"{flag} holds a diffusion network, not an autoencoder; train one by `python -m fastdiff autoencoder`."
            )
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    if known not in ("", digest.hexdigest()):
        raise UserError(
            f"{flag} is another autoencoder than the one whose latents the network has learned; restore it."
        )
    return AutoencoderWeights(ours, state, pixels, str(where.resolve()), digest.hexdigest(), tiny)


def with_latents(config: Config, autoencoder: AutoencoderWeights | None) -> Config:
    """The config of a network that sees the latents: their size and channels, and the images' size.

    Raises:
        UserError: images whose size is no multiple of the autoencoder's factor, or a network that does not fit.
    """
    if autoencoder is None:
        return config
    shape, pixels = autoencoder.config, config.space.pixels or autoencoder.pixels
    require(pixels > 0, "pixels", pixels, "given, as the autoencoder does not say what images it was trained on")
    expected = f"a multiple of the autoencoder's factor, {shape.factor}"
    require(pixels % shape.factor == 0, "pixels", pixels, expected)
    return config.replace(
        pixels=pixels, autoencoder_sha256=autoencoder.sha256, image_size=pixels // shape.factor,
        image_channels=shape.latent_channels, sigma_data=1.0,
    )  # fmt: skip

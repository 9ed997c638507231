"""The autoencoder of a run that works in latents: known by its weights, and kept in the run."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastdiff.checks import require
from fastdiff.config import Config
from fastdiff.data.datasets import expanded
from fastdiff.errors import UserError
from fastdiff.interop import WEIGHTS, check_shapes, read_json, read_tensors, shapes_of
from fastdiff.interop_autoencoder import FoundAutoencoder, TinyAutoencoder, is_autoencoder, read_autoencoder
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.nets.autoencoder import Autoencoder
from fastdiff.presets import PRESETS
from fastdiff.runs.files import write_atomically
from fastdiff.runs.outputs import complete_folder
from fastdiff.runs.run import json_text
from fastdiff.runs.weights import read_trained, weights_sha256

OURS = "fastdiff.Autoencoder"  # the _class_name of what `AutoencoderWeights.save` writes
FOLDER = "autoencoder"  # in a run, and in a folder of `export --to safetensors`


@dataclass(frozen=True, kw_only=True)
class AutoencoderWeights(FoundAutoencoder):
    """A trained autoencoder, ours or diffusers', where it lies and the SHA-256 (hex) of its weights.

    Its `state` holds the mean and the standard deviation of its latents, except for a tiny one.
    """

    path: Path
    sha256: str

    @property
    def saved(self) -> dict[str, str]:
        """What a checkpoint keeps of it."""
        return {"autoencoder_path": str(self.path.resolve())}

    def make(self, device: torch.device) -> Autoencoder | TinyAutoencoder:
        """The network, in eval mode, its weights fixed. Raises UserError for a tiny one where diffusers is missing."""
        if self.tiny is not None:
            model = TinyAutoencoder(self.config, self.tiny, self.state)
        else:
            model = Autoencoder(self.config)
            model.load_state_dict(self.state)
        return model.to(device).eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write it into a new folder, as `autoencoder_weights` reads it."""
        values = self.tiny or {"_class_name": OURS, "pixels": self.pixels, **asdict(self.config)}
        with complete_folder(folder, flag="") as made:
            save_file({name: value.contiguous() for name, value in self.state.items()}, made / WEIGHTS[0])
            write_atomically(made / "config.json", json_text(values).encode())


def autoencoder_weights(
    config: Config, saved: Mapping[str, Any], *, home: Path | None = None, moved: Path | None = None,
    flag: str = "--latents",
) -> AutoencoderWeights | None:  # fmt: skip
    """The autoencoder that `--latents` names, if it names one.

    Tried are the copy in the run, where it lay, and the name, in this order, until one has the weights that the run
    knows; or only what a user names now.

    Args:
        saved: the state of the checkpoint to go on from, or to draw from, which knows where it lay; {} for a new run.
        home: the run, or the exported folder, that may keep a copy.
        moved: where a user says that it lies.
        flag: by which a user can say so, for messages.

    Raises:
        UserError: it cannot be read, is another one than before, or was never measured; or a run would begin, or cease,
            to work in latents.
    """
    named, known = config.space.latents, config.space.autoencoder_sha256
    before = Config.from_dict(saved["config"]).space.latents if saved else named
    if (named is None) != (before is None):
        raise UserError("--resume cannot add or drop --latents, which would change what is trained.")
    if named is None:
        if moved is not None:
            raise UserError(f"--autoencoder {moved} would decode nothing: this network draws pixels; drop it.")
        return None
    places = [named if moved is None else str(moved)]
    if moved is None and named == before and home is not None:
        places = [str(home / FOLDER), saved.get("autoencoder_path", named), named]
    problem = f"the autoencoder {places[-1]} is not there; if it has moved, add {flag} and its new place."
    for path in dict.fromkeys(map(expanded, places)):
        if not path.exists():
            continue
        try:
            found = _read(path)
        except UserError as error:
            problem = str(error)
            continue
        if known in ("", found.sha256):
            return found
        problem = f"{path} is another autoencoder than the one whose latents the network has learned; restore it."
    raise UserError(problem)


def _read(path: Path) -> AutoencoderWeights:
    settings = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if settings.get("_class_name") == OURS:
        values = {name: value for name, value in settings.items() if name != "_class_name"}
        try:
            pixels, config = values.pop("pixels"), AutoencoderConfig(**values)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path / 'config.json'} is of another version ({error}); restore it.") from error
        state = read_tensors(path / WEIGHTS[0])
        check_shapes(state, shapes_of(Autoencoder, config))
        return AutoencoderWeights(config, state, pixels, path=path, sha256=weights_sha256(state))
    if is_autoencoder(path):
        found = read_autoencoder(path)
        beside = ("scaling_factor", "shift_factor", "act_fn")  # which a tiny one's weights do not hold
        more = "" if found.tiny is None else str([found.tiny.get(name) for name in beside])
        return AutoencoderWeights(**vars(found), path=path, sha256=weights_sha256(found.state, more))
    trained = read_trained(path)
    if trained.config.autoencoder.factor == 0:
        raise UserError(
            f"{path} holds a diffusion network, not an autoencoder; train one by `python -m fastdiff autoencoder`."
        )
    if not trained.state["latent_std"].all():
        raise UserError(
            f"{path} has not been evaluated yet, so that the mean and standard deviation of its latents are unknown; "
            "let it train to its first evaluation (--eval-every)."
        )
    if (evaluated := trained.rest.get("evaluated", trained.step)) != trained.step:
        print(f"{path}: its latents were measured at step {evaluated:,}, not at {trained.step:,}", file=sys.stderr)
    config = replace(trained.config.autoencoder, critic_weight=0.0, critic_start=0)
    state = {name: value for name, value in trained.state.items() if not name.startswith("critic.")}
    sha256 = weights_sha256(state)
    return AutoencoderWeights(config, state, trained.config.pixels, path=trained.path, sha256=sha256)


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
    theirs = {"image_size": pixels // shape.factor, "image_channels": shape.latent_channels, "sigma_data": 1.0}
    default, ours = PRESETS[config.preset].flat(), config.flat()
    for name, value in theirs.items():
        require(ours[name] in (default[name], value), name, ours[name], f"{value}, by --latents (images: --pixels)")
    return config.replace(pixels=pixels, autoencoder_sha256=autoencoder.sha256, **theirs)

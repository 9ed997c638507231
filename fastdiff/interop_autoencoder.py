"""Autoencoders from and to diffusers' `AutoencoderKL`, whose layout ours has; and its `AutoencoderTiny` as it is.

diffusers itself is needed for the second only.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.interop import WEIGHTS, check_shapes, read_json, read_tensors
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.nets.autoencoder import LOG_VAR, Autoencoder

# Parts that are the same in both, ours -> diffusers', applied in this order to a parameter's name.
_RENAMES = [
    (r"^encoder\.moments\.", "quant_conv."),
    (r"^decoder\.latents\.", "post_quant_conv."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.(down|up)\.(\d+)\.\d+\.conv\.", r".\1_blocks.\2.\1samplers.0.conv."),
    (r"\.(down|up)\.(\d+)\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"(resnets\.\d+\.)(norm|conv)_([12])\.", r"\1\2\3."),
    (r"(resnets\.\d+\.)shortcut\.", r"\1conv_shortcut."),
    (r"(attentions\.\d+\.)norm\.", r"\1group_norm."),
    (r"(attentions\.\d+\.)out\.", r"\1to_out.0."),
]
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
NAMES = ("AutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True)
class FoundAutoencoder:
    """An autoencoder as diffusers saved it.

    Attributes:
        config: its shape; of a tiny one factor and latent_channels.
        state: its weights, on the CPU; under our names but for a tiny one.
        pixels: height and width of the images it was trained on; 0 if it does not say.
        tiny: the settings of an AutoencoderTiny.
    """

    config: AutoencoderConfig
    state: dict[str, Tensor]
    pixels: int
    tiny: dict[str, Any] | None = None


class TinyAutoencoder(nn.Module):
    """An AutoencoderTiny in the place of an `Autoencoder`: its latents have no variance.

    Raises:
        UserError: diffusers is not installed, or the weights are of another shape.
    """

    def __init__(self, config: AutoencoderConfig, settings: dict[str, Any], state: dict[str, Tensor]) -> None:
        super().__init__()
        try:
            from diffusers import AutoencoderTiny
        except ImportError as error:
            raise UserError("an AutoencoderTiny needs diffusers; run `pip install diffusers`.") from error
        made: Any = AutoencoderTiny.from_config(settings)
        check_shapes(state, {name: tuple(value.shape) for name, value in made.state_dict().items()})
        made.load_state_dict(state)
        self.config, self.model = config, made

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `Autoencoder.encode`."""
        z = self.model.encode(x).latents
        return z, torch.full_like(z, LOG_VAR[0])

    def decode(self, z: Tensor) -> Tensor:
        """As `Autoencoder.decode`."""
        return self.model.decode(z).sample


def is_autoencoder(folder: Path) -> bool:
    """Whether the folder is one of a diffusers autoencoder, or of a pipeline with one."""
    folder = _part(folder)
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("_class_name") in NAMES


def read_autoencoder(folder: Path) -> FoundAutoencoder:
    """Read the folder of an autoencoder, or of a pipeline with one as its `vae`. No code of a .bin file is run.

    Raises:
        UserError: a damaged file, or an autoencoder of another layout.
    """
    folder = _part(folder)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])
    settings, theirs = read_json(folder / "config.json"), read_tensors(weights)
    size = settings.get("sample_size")
    size = size if isinstance(size, int) else 0
    try:
        if settings["_class_name"] == "AutoencoderTiny":
            return FoundAutoencoder(_tiny_config(settings), theirs, size, settings)
        config = _config(settings)
        state = _state(config, settings, theirs)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    return FoundAutoencoder(config, state, size)


def autoencoder_shapes(config: AutoencoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each of an autoencoder's parameters."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Autoencoder(config).state_dict().items()}


def save_autoencoder_kl(
    model: Autoencoder, folder: Path, *, pixels: int, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> None:
    """Write a folder that `AutoencoderKL.from_pretrained` loads.

    Args:
        folder: made if missing.
        pixels: height and width of its images.
        mean, std: of each channel of its latents, if the saved one's shall have mean 0 and standard deviation 1: its
            first and last 1x1 convolutions take them in.
    """
    ours = {
        name: value.detach().cpu().float().clone()
        for name, value in model.state_dict().items()
        if not name.startswith("critic.")
    }
    if mean:
        m, s = torch.tensor(mean), torch.tensor(std)
        weight, bias = ours["encoder.moments.weight"], ours["encoder.moments.bias"]
        c = len(m)
        weight[:c] /= s[:, None, None, None]
        bias[:c] = (bias[:c] - m) / s
        bias[c:] -= 2 * s.log()
        weight, bias = ours["decoder.latents.weight"], ours["decoder.latents.bias"]
        bias += weight[:, :, 0, 0] @ m
        weight *= s[None, :, None, None]
    state = {}
    for name, value in ours.items():
        names = _theirs(name)
        for other, part in zip(names, value.chunk(len(names)), strict=True):
            state[other] = part.contiguous().clone()
    config = model.config
    levels = len(config.widths)
    settings = {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": config.latent_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.widths), "layers_per_block": config.blocks, "act_fn": "silu",
        "norm_num_groups": config.norm_groups, "sample_size": pixels, "scaling_factor": 1.0, "force_upcast": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(state, folder / WEIGHTS[0])


def _part(folder: Path) -> Path:
    """The autoencoder's folder in that of a pipeline."""
    return folder / "vae" if (folder / "vae").is_dir() else folder


def _tiny_config(settings: dict[str, Any]) -> AutoencoderConfig:
    """Factor and channels of an AutoencoderTiny. Raises UserError for settings of none."""
    widths = settings.get("encoder_block_out_channels", [64] * 4)
    if not isinstance(widths, list):
        raise UserError(f"encoder_block_out_channels is {widths!r}, but must list channels.")
    return AutoencoderConfig(factor=2 ** (len(widths) - 1), latent_channels=settings.get("latent_channels", 4))


def _config(settings: dict[str, Any]) -> AutoencoderConfig:
    """Its shape. Raises UserError for what ours cannot be."""
    widths, blocks = settings.get("block_out_channels"), settings.get("layers_per_block", 1)
    if not (isinstance(widths, list) and widths and all(isinstance(w, int) for w in widths)):
        raise UserError(f"block_out_channels is {widths!r}, but must list channels.")
    config = AutoencoderConfig(
        factor=2 ** (len(widths) - 1), latent_channels=settings.get("latent_channels", 4), base_channels=widths[0],
        blocks=blocks,
    )  # fmt: skip
    levels = len(widths)
    for name, expected, default in (
        ("in_channels", 3, 3), ("out_channels", 3, 3), ("block_out_channels", list(config.widths), None),
        ("norm_num_groups", config.norm_groups, 32), ("act_fn", "silu", "silu"),
        ("down_block_types", ["DownEncoderBlock2D"] * levels, ["DownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"] * levels, ["UpDecoderBlock2D"]),
        ("mid_block_add_attention", True, True),
    ):  # fmt: skip
        if (found := settings.get(name, default)) != expected:
            raise UserError(f"{name} is {found!r}, but our autoencoder has {expected!r}.")
    return config


def _state(config: AutoencoderConfig, settings: dict[str, Any], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under our names. Raises UserError for other shapes."""
    modern = {_modern_name(name): value for name, value in theirs.items()}
    c = config.latent_channels
    for flag, name, n in (("use_quant_conv", "quant_conv", 2 * c), ("use_post_quant_conv", "post_quant_conv", c)):
        if not settings.get(flag, True):
            modern |= {f"{name}.weight": torch.eye(n)[:, :, None, None], f"{name}.bias": torch.zeros(n)}
    shapes, expected = autoencoder_shapes(config), {}
    for name, shape in shapes.items():
        others = _theirs(name)
        for other in others:
            expected[other] = (shape[0] // len(others), *shape[1:])
    for name, v in modern.items():  # attention was made of 1x1 convolutions once
        if v.ndim == 4 and expected.get(name) == tuple(v.shape[:2]):
            modern[name] = v.flatten(1)
    check_shapes(modern, expected)
    return {name: torch.cat([modern[other] for other in _theirs(name)]).float() for name in shapes}


def _theirs(name: str) -> list[str]:
    """The diffusers parameters that make up one of ours; several are concatenated along dimension 0."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return [name.replace(".qkv.", f".to_{part}.") for part in "qkv"] if ".qkv." in name else [name]


def _modern_name(name: str) -> str:
    return re.sub(r"(attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", name)

"""Autoencoders from and to diffusers' `AutoencoderKL`, whose layout ours has; and its `AutoencoderTiny` as it is.

diffusers itself is needed for the second only.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.interop import (
    BLOCKS,
    WEIGHTS,
    check_shapes,
    read_json,
    read_model,
    shapes_of,
    state_from_diffusers,
    state_to_diffusers,
)
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.nets.autoencoder import LOG_VAR, Autoencoder

# Parts that are the same in both, ours -> diffusers', applied in this order to a parameter's name.
_RENAMES = [
    (r"^encoder\.conv_moments\.", "quant_conv."),
    (r"^decoder\.conv_latents\.", "post_quant_conv."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.(down|up)\.(\d+)\.\d+\.conv\.", r".\1_blocks.\2.\1samplers.0.conv."),
    (r"\.(down|up)\.(\d+)\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    *BLOCKS,
]
CLASSES = ("AutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True)
class FoundAutoencoder:
    """An autoencoder as diffusers saved it, on the CPU."""

    config: AutoencoderConfig  # its shape; of a tiny one factor and latent_channels
    state: dict[str, Tensor]  # under our names, or diffusers' for a tiny one
    pixels: int  # height and width of the images it was trained on; 0 if it does not say
    tiny: dict[str, Any] | None = None  # the settings of an AutoencoderTiny


class TinyAutoencoder(nn.Module):
    """An AutoencoderTiny in the place of an `Autoencoder`: its latents have no variance of their own.

    Raises UserError if diffusers is not installed, or the weights are of another shape.
    """

    latent_mean: Tensor
    latent_std: Tensor

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
        for name, value in _mean_and_std(settings, config.latent_channels, 1.0).items():
            self.register_buffer(name, value)

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
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("_class_name") in CLASSES


def read_autoencoder(folder: Path) -> FoundAutoencoder:
    """Read the folder of an autoencoder, or of a pipeline with one as its `vae`; runs no code of a .bin file.

    Raises UserError for a missing or damaged file, or an autoencoder of another layout.
    """
    folder = _part(folder)
    settings, theirs = read_model(folder)
    try:
        size = _number(settings, "sample_size", 0) if settings.get("sample_size") else 0
        if settings.get("_class_name") == "AutoencoderTiny":
            widths = _widths(settings, "encoder_block_out_channels", [64] * 4)
            channels = _number(settings, "latent_channels", 4)
            config = AutoencoderConfig(factor=2 ** (len(widths) - 1), latent_channels=channels, equivariance=False)
            return FoundAutoencoder(config, {name: value.float() for name, value in theirs.items()}, size, settings)
        config = _config(settings)
        state = _state(config, settings, theirs)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    return FoundAutoencoder(config, state, size)


def save_autoencoder_kl(model: Autoencoder, folder: Path, *, pixels: int) -> None:
    """Write a folder that `AutoencoderKL.from_pretrained` loads.

    Our mean and standard deviation are folded into its two 1x1 convolutions: its latents have mean 0 and deviation 1.
    Its images are `pixels` high and wide. Raises UserError if no evaluation has measured the latents.
    """
    state = {name: value.detach().cpu().float().clone() for name, value in model.state_dict().items()}
    ours = {name: value for name, value in state.items() if name.startswith(("encoder.", "decoder."))}
    m, s, c = state["latent_mean"], state["latent_std"], model.config.latent_channels
    if not s.all():
        raise UserError("the autoencoder has not been evaluated yet; let it train to its first evaluation.")
    weight, bias = ours["encoder.conv_moments.weight"], ours["encoder.conv_moments.bias"]
    weight[:c] /= s[:, None, None, None]
    bias[:c] = (bias[:c] - m) / s
    bias[c:] -= 2 * s.log()
    weight, bias = ours["decoder.conv_latents.weight"], ours["decoder.conv_latents.bias"]
    bias += weight[:, :, 0, 0] @ m
    weight *= s[None, :, None, None]
    config, levels = model.config, len(model.config.widths)
    settings = {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": c,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.widths), "layers_per_block": config.blocks, "act_fn": "silu",
        "norm_num_groups": config.norm_groups, "sample_size": pixels, "scaling_factor": 1.0, "force_upcast": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(state_to_diffusers(ours, _RENAMES), folder / WEIGHTS[0])


def _part(folder: Path) -> Path:
    """A pipeline keeps its autoencoder in the folder `vae`."""
    return folder / "vae" if (folder / "vae").is_dir() else folder


def _number(settings: dict[str, Any], name: str, default: float, kind: type = int) -> Any:
    """A setting that is a number above 0. Raises UserError for another."""
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (kind, int)) or not 0 < value < 2**31:
        raise UserError(f"{name} is {value!r}, but must be a number above 0.")
    return value


def _widths(settings: dict[str, Any], name: str, default: list[int] | None = None) -> list[int]:
    """A setting that lists the channels of each resolution. Raises UserError for another."""
    widths = settings.get(name, default)
    if not (isinstance(widths, list) and all(isinstance(w, int) and w > 0 for w in widths) and 2 <= len(widths) <= 5):
        raise UserError(f"{name} is {widths!r}, but must list the channels of two to five resolutions.")
    return widths


def _config(settings: dict[str, Any]) -> AutoencoderConfig:
    """Its shape. Raises UserError for what ours cannot be."""
    widths = _widths(settings, "block_out_channels")
    channels, levels = _number(settings, "latent_channels", 4), len(widths)
    if widths[0] % 4 or (widths[0] > 128 and widths[0] % 32):
        raise UserError(f"block_out_channels begins with {widths[0]}, but ours with a multiple of 4, above 128 of 32.")
    config = AutoencoderConfig(
        factor=2 ** (levels - 1), latent_channels=channels, base_channels=widths[0],
        blocks=_number(settings, "layers_per_block", 1), equivariance=False,
    )  # fmt: skip
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
    c = config.latent_channels
    for flag, name, n in (("use_quant_conv", "quant_conv", 2 * c), ("use_post_quant_conv", "post_quant_conv", c)):
        if not settings.get(flag, True):
            theirs |= {f"{name}.weight": torch.eye(n)[:, :, None, None], f"{name}.bias": torch.zeros(n)}
    known = _mean_and_std(settings, c, 0.18215)
    shapes = {name: shape for name, shape in shapes_of(Autoencoder, config).items() if name not in known}
    state = state_from_diffusers(theirs, shapes, _RENAMES)
    return {name: value.float() for name, value in state.items()} | known


def _mean_and_std(settings: dict[str, Any], channels: int, scale: float) -> dict[str, Tensor]:
    """Our buffers of what diffusers calls shift_factor and 1 / scaling_factor, the same for each channel."""
    shift = settings.get("shift_factor") or 0.0
    if not isinstance(shift, int | float) or not math.isfinite(shift):
        raise UserError(f"shift_factor is {shift!r}, but must be a finite number.")
    scale = _number(settings, "scaling_factor", scale, float)
    return {"latent_mean": torch.full((channels,), float(shift)), "latent_std": torch.full((channels,), 1 / scale)}

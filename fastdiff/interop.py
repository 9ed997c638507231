"""Weights from and to diffusers' `UNet2DModel`, in the layout of google/ddpm-cifar10-32.

The two networks compute the same function; they differ in the names of their parts, and in that diffusers keeps the
query, key and value projections apart. diffusers itself is imported only to build one of its objects.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.config import UNetConfig
from fastdiff.errors import UserError
from fastdiff.nets.unet import UNet

# diffusers' scheduler settings that reproduce each of our schedules.
SCHEDULER_SETTINGS: dict[str, dict[str, Any]] = {
    "ddpm-linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}

# Parts that are the same in both, ours -> diffusers', applied in this order to a parameter's name.
_RENAMES = [
    (r"^time\.", "time_embedding."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^middle_1\.", "mid_block.resnets.0."),
    (r"^middle_2\.", "mid_block.resnets.1."),
    (r"^middle_attention\.", "mid_block.attentions.0."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d+)\.attention\.(\d+)\.", r"\1_blocks.\2.attentions.\3."),
    (r"^(down|up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
    (r"(resnets\.\d+\.)(norm|conv)_([12])\.", r"\1\2\3."),
    (r"(resnets\.\d+\.)embedding\.", r"\1time_emb_proj."),
    (r"(resnets\.\d+\.)shortcut\.", r"\1conv_shortcut."),
    (r"(attentions\.\d+\.)norm\.", r"\1group_norm."),
    (r"(attentions\.\d+\.)out\.", r"\1to_out.0."),
]


def _diffusers_names(name: str) -> list[str]:
    """The diffusers parameters that make up one of ours; several are concatenated along dimension 0."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return [name.replace(".qkv.", f".to_{part}.") for part in "qkv"] if ".qkv." in name else [name]


def unet_config_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """The settings of a diffusers `UNet2DModel` of the same shape."""
    attends = [
        config.image_size // 2**level in config.attention_resolutions for level in range(len(config.channel_mult))
    ]
    return {
        "sample_size": config.image_size,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "block_out_channels": [config.channels * m for m in config.channel_mult],
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "layers_per_block": config.blocks_per_level,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.norm_groups,
        "dropout": config.dropout,
        "act_fn": "silu",
        "center_input_sample": False,
        "mid_block_scale_factor": 1,
        "time_embedding_type": "positional",
        "add_attention": True,
    }


def unet_config_from_diffusers(settings: Mapping[str, Any]) -> UNetConfig:
    """The inverse of `unet_config_to_diffusers`.

    Raises:
        UserError: a setting that our U-Net has no counterpart for; the message names it.
    """
    widths = list(settings["block_out_channels"])
    attends = [kind == "AttnDownBlock2D" for kind in settings["down_block_types"]]
    size = settings["sample_size"]
    config = UNetConfig(
        image_size=size,
        image_channels=settings["in_channels"],
        channels=widths[0],
        channel_mult=tuple(w // widths[0] for w in widths),
        blocks_per_level=settings["layers_per_block"],
        attention_resolutions=tuple(size // 2**level for level, attention in enumerate(attends) if attention),
        norm_groups=settings["norm_num_groups"],
        norm_eps=settings["norm_eps"],
        dropout=settings.get("dropout", 0.0),
    )
    for name, expected in unet_config_to_diffusers(config).items():
        value = settings.get(name, expected)
        value = list(value) if isinstance(value, tuple) else value
        if value != expected:
            raise UserError(f"this diffusers U-Net has {name} = {value!r}, but only {expected!r} can be converted.")
    return config


def unet_state_to_diffusers(model: UNet) -> dict[str, Tensor]:
    """The weights under diffusers' names, contiguous, on the CPU."""
    state = {}
    for name, value in model.state_dict().items():
        names = _diffusers_names(name)
        for other, part in zip(names, value.chunk(len(names)), strict=True):
            state[other] = part.detach().cpu().contiguous().clone()
    return state


def unet_from_diffusers(source: Any) -> UNet:
    """Build a UNet from a diffusers one.

    Args:
        source: a `diffusers.UNet2DModel`, or the path of a pipeline's or U-Net's folder (config.json and
            diffusion_pytorch_model.safetensors); a folder needs no diffusers.

    Raises:
        UserError: no such folder, or a network that our U-Net has no counterpart for.
    """
    if isinstance(source, str | Path):
        folder = Path(source)
        folder = folder / "unet" if (folder / "unet").is_dir() else folder
        weights = folder / "diffusion_pytorch_model.safetensors"
        for path in (folder / "config.json", weights):
            if not path.is_file():
                raise UserError(f"{path} is missing; expected the folder of a diffusers pipeline or U-Net.")
        settings, theirs = json.loads((folder / "config.json").read_text()), load_file(weights)
    else:
        settings, theirs = source.config, source.state_dict()
    model = UNet(unet_config_from_diffusers(settings))
    wanted = {name: _diffusers_names(name) for name in model.state_dict()}
    unmatched = set(theirs) ^ {other for names in wanted.values() for other in names}
    if unmatched:
        raise UserError(
            f"the diffusers weights do not match the U-Net's parts: {', '.join(sorted(unmatched)[:3])}, ..."
        )
    model.load_state_dict({name: torch.cat([theirs[other] for other in names]) for name, names in wanted.items()})
    return model


def unet_to_diffusers(model: UNet) -> Any:
    """The same network as a `diffusers.UNet2DModel`, in float32 on the CPU. Raises UserError without diffusers."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise UserError("diffusers is not installed; run `pip install diffusers`.") from error
    other: Any = UNet2DModel(**unet_config_to_diffusers(model.config))
    other.load_state_dict(unet_state_to_diffusers(model))
    return other


def save_diffusers_pipeline(
    model: UNet, folder: Path, *, schedule: str, timesteps: int, objective: str = "eps", zero_terminal_snr: bool = False
) -> None:
    """Write a folder that `diffusers.DDPMPipeline.from_pretrained` loads.

    Args:
        model: a UNet that was trained with the following.
        folder: made if missing; files of the same names are replaced.
        schedule: a name in SCHEDULER_SETTINGS.
        timesteps: T.
        objective: a name in PREDICTION_TYPES.
        zero_terminal_snr: the schedule is rescaled to end in pure noise.

    Raises:
        UserError: a schedule or an objective that diffusers' DDPMScheduler does not know, or more than 1000 timesteps.
    """
    if timesteps > 1000:
        raise UserError(
            f"{timesteps} timesteps cannot be exported: this network is given numbers up to 1000, and diffusers' would "
            "be given the step's own; use --to safetensors."
        )
    for what, name, known in (("schedule", schedule, SCHEDULER_SETTINGS), ("objective", objective, PREDICTION_TYPES)):
        if name not in known:
            raise UserError(
                f"{what} {name!r} cannot be exported, as diffusers' DDPMScheduler has only {', '.join(known)}; use "
                "--to safetensors."
            )
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": timesteps,
        "prediction_type": PREDICTION_TYPES[objective],
        "rescale_betas_zero_snr": zero_terminal_snr,
        "variance_type": "fixed_large",
        "clip_sample": True,
        **SCHEDULER_SETTINGS[schedule],
    }
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    unet = {"_class_name": "UNet2DModel", **unet_config_to_diffusers(model.config)}
    for name, content in (
        ("model_index.json", index),
        ("unet/config.json", unet),
        ("scheduler/scheduler_config.json", scheduler),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    save_file(unet_state_to_diffusers(model), folder / "unet" / "diffusion_pytorch_model.safetensors")

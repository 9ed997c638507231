"""The settings of diffusers' `UNet2DModel` and `DDPMScheduler` that mean the same as ours, both ways.

A silent difference is worse than a refusal: a setting that we do not know, or have no counterpart for, is refused,
never guessed.
"""

import operator
from collections.abc import Mapping
from typing import Any

from fastdiff.errors import UserError
from fastdiff.model_sections import UNetConfig, task

# diffusers' settings that reproduce each of our schedules.
SCHEDULES: dict[str, dict[str, Any]] = {
    "ddpm-linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}

# All settings of a UNet2DModel with the defaults that diffusers gives those which a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# Not of the network: num_train_timesteps counts for learned time embeddings only, the others are EMAModel's.
_HARMLESS = {
    "num_train_timesteps", "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup",
    "inv_gamma", "power",
}  # fmt: skip


def not_exported(what: str, why: str) -> UserError:
    return UserError(f"{what} cannot be exported, as {why}; use --to safetensors.")


def unet_config_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """The settings of a diffusers `UNet2DModel` of the same shape. Raises UserError for one with patches."""
    if config.patch > 1:
        raise not_exported(f"a network with --patch {config.patch}", "UNet2DModel has no patches")
    attends = [resolution in config.attention_resolutions for resolution in config.resolutions]
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
        "resnet_time_scale_shift": "scale_shift" if config.norm_conditioning else "default",
        # Without it the middle's attention has no norm there, where norms are adaptive.
        "attn_norm_num_groups": config.norm_groups if config.norm_conditioning else None,
        "add_attention": True,
        "num_class_embeds": config.num_classes + 1 if config.num_classes else None,
    }


def unet_config_from_diffusers(settings: Mapping[str, Any], *, image_size: int | None = None) -> UNetConfig:
    """The inverse of `unet_config_to_diffusers`; a setting that is absent has diffusers' default.

    Args:
        image_size: of a network whose sample_size is null.

    Raises:
        UserError: an unknown setting, or values that our U-Net has no counterpart for; the message names them all.
    """
    try:
        theirs = _in_one_spelling(settings, image_size)
        widths = [operator.index(width) for width in theirs["block_out_channels"]]
        size = operator.index(theirs["sample_size"])
        attends = [kind == "AttnDownBlock2D" for kind in theirs["down_block_types"]]
        config = UNetConfig(
            image_size=size,
            image_channels=operator.index(theirs["in_channels"]),
            channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            blocks_per_level=operator.index(theirs["layers_per_block"]),
            attention_resolutions=tuple(size // 2**level for level, attention in enumerate(attends) if attention),
            norm_groups=operator.index(theirs["norm_num_groups"]),
            norm_eps=theirs["norm_eps"],
            dropout=theirs["dropout"],
            norm_conditioning=theirs["resnet_time_scale_shift"] == "scale_shift",
            num_classes=max(0, operator.index(theirs["num_class_embeds"] or 0) - 1),  # the last means no class
        )
    except (TypeError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"these settings are of no UNet2DModel ({error}).") from error
    ours = DEFAULTS | unet_config_to_diffusers(config)
    if wrong := [f"{name} = {theirs[name]!r} (only {ours[name]!r})" for name in ours if theirs[name] != ours[name]]:
        raise UserError(f"this diffusers U-Net cannot be converted, as it has {', '.join(wrong)}.")
    return config


def _in_one_spelling(settings: Mapping[str, Any], image_size: int | None) -> dict[str, Any]:
    """All settings of the network, with the values that our networks have where others mean the same."""
    kind = settings.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise UserError(f"this is a diffusers {kind}, but only a UNet2DModel can be converted.")
    # Names with an underscore are diffusers' own notes, which no network is built from.
    given = {name: value for name, value in settings.items() if not name.startswith("_") and name not in _HARMLESS}
    if unknown := sorted(given.keys() - DEFAULTS.keys()):
        raise UserError(f"this diffusers U-Net cannot be converted, as it has unknown settings: {', '.join(unknown)}.")
    s = {name: list(v) if isinstance(v, tuple) else v for name, v in (DEFAULTS | given).items()}
    if isinstance(s["sample_size"], list) and len(set(s["sample_size"])) == 1:
        s["sample_size"] = s["sample_size"][0]
    if s["sample_size"] is None:
        if image_size is None:
            raise UserError("this diffusers U-Net leaves sample_size open; give its image_size.")
        s["sample_size"] = image_size
    for name in ("down_block_types", "up_block_types"):
        s[name] = [kind.removeprefix("UNetRes") for kind in s[name]]
    if s["act_fn"] == "swish":
        s["act_fn"] = "silu"
    if s["attn_norm_num_groups"] == s["norm_num_groups"] and s["resnet_time_scale_shift"] == "default":
        s["attn_norm_num_groups"] = None
    widths = s["block_out_channels"]
    if s["time_embedding_dim"] == 4 * widths[0]:
        s["time_embedding_dim"] = None
    attending = [width for width, kind in zip(widths, s["down_block_types"], strict=False) if kind == "AttnDownBlock2D"]
    if {*attending, widths[-1]} == {s["attention_head_dim"]}:  # one head, in the middle too
        s["attention_head_dim"] = None
    return s


def scheduler_to_diffusers(
    *, objective: str, schedule: str, timesteps: int, zero_terminal_snr: bool = False, time_scale: float = 1.0
) -> dict[str, Any]:
    """The settings of a `DDPMScheduler` that draws as our `ddpm` does, wherever the number of steps divides T.

    Others come out differently in part, as diffusers computes its trailing times in floating point.

    Raises:
        UserError: an objective, a schedule, a T or a time scale that diffusers has no counterpart for.
    """
    for what, name, known in (("schedule", schedule, SCHEDULES), ("objective", objective, PREDICTION_TYPES)):
        if name not in known:
            raise not_exported(f"{what} {name!r}", f"diffusers' DDPMScheduler has only {', '.join(known)}")
    own_number = "diffusers would give this network the step's own number"
    if timesteps > 1000:
        raise not_exported(f"{timesteps} timesteps", f"{own_number}, not one up to 1000")
    if time_scale != 1:
        raise not_exported(f"time scale {time_scale:g}", own_number)
    if zero_terminal_snr and timesteps == 1:
        raise not_exported("zero terminal SNR with 1 timestep", "diffusers makes NaN of it")
    return {
        "num_train_timesteps": timesteps,
        "prediction_type": PREDICTION_TYPES[objective],
        "rescale_betas_zero_snr": zero_terminal_snr,
        # Those of our sampler, where diffusers' defaults differ or may come to: steps from T down, the posterior's
        # variance, and x0 clamped to [-1, 1].
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "variance_type": "fixed_small",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "thresholding": False,
        **SCHEDULES[schedule],
    }


def trained_as(settings: Mapping[str, Any]) -> str:
    """What a network was trained for, by the settings of its scheduler; see `fastdiff.config.task`."""
    defaults: dict[str, Any] = {**SCHEDULES["ddpm-linear"], "prediction_type": "epsilon"}  # diffusers'
    s = {**defaults, **settings}
    objective = next((ours for ours, name in PREDICTION_TYPES.items() if name == s["prediction_type"]), None)
    schedule = next((ours for ours, theirs in SCHEDULES.items() if theirs.items() <= s.items()), None)
    return task(
        objective or s["prediction_type"],
        (schedule if s.get("trained_betas") is None else None) or f"other betas ({s['beta_schedule']})",
        timesteps=s.get("num_train_timesteps", 1000),
        zero_terminal_snr=bool(s.get("rescale_betas_zero_snr")),
    )

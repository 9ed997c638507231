"""Networks from and to diffusers' `UNet2DModel`, in the layout of google/ddpm-cifar10-32.

The two networks compute the same function; they differ in the names of their parts, and in that diffusers keeps the
query, key and value projections apart. The last of the class embeddings means no class. diffusers itself is imported
only to build one of its objects.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdiff.data.layout import some
from fastdiff.errors import UserError
from fastdiff.interop_settings import (
    not_exported,
    scheduler_to_diffusers,
    trained_as,
    unet_config_from_diffusers,
    unet_config_to_diffusers,
)
from fastdiff.model_sections import UNetConfig
from fastdiff.nets.unet import UNet

Renames = Sequence[tuple[str, str]]

# Within residual blocks and attentions, once these have diffusers' names.
BLOCKS = [
    (r"(resnets\.\d+\.)(norm|conv)_([12])\.", r"\1\2\3."),
    (r"(resnets\.\d+\.)embedding\.", r"\1time_emb_proj."),
    (r"(resnets\.\d+\.)shortcut\.", r"\1conv_shortcut."),
    (r"(attentions\.\d+\.)norm\.", r"\1group_norm."),
    (r"(attentions\.\d+\.)out\.", r"\1to_out.0."),
]
# Parts that are the same in both, ours -> diffusers', applied in this order to a parameter's name.
_RENAMES = [
    (r"^time\.", "time_embedding."),
    (r"^label\.", "class_embedding."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^middle_1\.", "mid_block.resnets.0."),
    (r"^middle_2\.", "mid_block.resnets.1."),
    (r"^middle_attention\.", "mid_block.attentions.0."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d+)\.attention\.(\d+)\.", r"\1_blocks.\2.attentions.\3."),
    (r"^(down|up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
    *BLOCKS,
]
# What older versions of diffusers called the parts of attention, as in the files of google/ddpm-cifar10-32.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def _theirs(name: str, renames: Renames) -> list[str]:
    """The diffusers parameters that make up one of ours; several are concatenated along dimension 0."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return [name.replace(".qkv.", f".to_{part}.") for part in "qkv"] if ".qkv." in name else [name]


def _modern_name(name: str) -> str:
    return re.sub(r"(attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", name)


def state_to_diffusers(ours: Mapping[str, Tensor], renames: Renames = _RENAMES) -> dict[str, Tensor]:
    """The weights under diffusers' names, contiguous, on the CPU."""
    state = {}
    for name, value in ours.items():
        names = _theirs(name, renames)
        for other, part in zip(names, value.chunk(len(names)), strict=True):
            state[other] = part.detach().cpu().contiguous().clone()
    return state


def state_from_diffusers(
    theirs: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], renames: Renames = _RENAMES
) -> dict[str, Tensor]:
    """The inverse, for a network of these shapes. Raises UserError if it has others."""
    names = {name: _theirs(name, renames) for name in shapes}
    expected = {
        other: (shapes[name][0] // len(others), *shapes[name][1:]) for name, others in names.items() for other in others
    }
    modern = {_modern_name(name): value for name, value in theirs.items()}
    if len(modern) < len(theirs):
        raise UserError("the weights have parts of attention under both their old names (query) and the new (to_q).")
    for name, value in modern.items():  # attention of autoencoders was made of 1x1 convolutions once
        if isinstance(value, Tensor) and value.ndim == 4 and expected.get(name) == tuple(value.shape[:2]):
            modern[name] = value.flatten(1)
    check_shapes(modern, expected)
    return {name: torch.cat([modern[other] for other in others]) for name, others in names.items()}


def shapes_of(network: Callable[[Any], nn.Module], config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each of the parameters and buffers of `network(config)`."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in network(config).state_dict().items()}


def check_shapes(state: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless `state` holds floating-point tensors of just these names and shapes."""
    found = {n: tuple(v.shape) if isinstance(v, Tensor) and v.is_floating_point() else None for n, v in state.items()}
    if wrong := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        listed = [f"{name} is {found.get(name, 'missing')}, not {expected.get(name, 'known')}" for name in wrong]
        raise UserError(f"the weights do not fit the network's shape: {some(listed, separator='; ')}.")


class DiffusersNetwork(NamedTuple):
    """A network as diffusers saved it, under our names, on the CPU."""

    config: UNetConfig
    state: dict[str, Tensor]
    task: str | None  # what it was trained for, by the pipeline around it; None without one


def read_diffusers(folder: Path, *, image_size: int | None = None) -> DiffusersNetwork:
    """Read a pipeline's or a U-Net's folder; it needs no diffusers, and runs no code of a .bin file.

    Args:
        image_size: of a network whose sample_size is null.

    Raises:
        UserError: no such folder, a damaged file, or a network that our U-Net has no counterpart for.
    """
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    settings, theirs = read_model(unet)
    try:
        config = unet_config_from_diffusers(settings, image_size=image_size)
        state = state_from_diffusers(theirs, shapes_of(UNet, config))
    except UserError as error:
        raise UserError(f"{unet}: {error}") from error
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return DiffusersNetwork(config, state, trained_as(read_json(scheduler)) if scheduler.is_file() else None)


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights in a diffusers model's folder. Raises UserError for a missing or damaged file."""
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])
    for path in (folder / "config.json", weights):
        if not path.is_file():
            raise UserError(
                f"{path} is missing; expected the folder of a diffusers pipeline or model, with {' or '.join(WEIGHTS)} "
                "(download it first)."
            )
    return read_json(folder / "config.json"), read_tensors(weights)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it cannot be read as one."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, but must hold an object.")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .bin file, on the CPU. Raises UserError for anything else; no pickle is run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # on a damaged file torch.load raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as tensors ({reason}); download or export it again.") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} holds no tensors by name, as a state dict has them.")
    return state


def unet_from_diffusers(source: Any, *, image_size: int | None = None) -> UNet:
    """Build a UNet from a `diffusers.UNet2DModel`, or from the folder of one or of a pipeline.

    Args:
        image_size: of a network whose sample_size is null.

    Raises:
        UserError: no such folder, a damaged file, or a network that our U-Net has no counterpart for.
    """
    if isinstance(source, str | Path):
        config, state, _ = read_diffusers(Path(source), image_size=image_size)
    else:
        config = unet_config_from_diffusers(source.config, image_size=image_size)
        state = state_from_diffusers(source.state_dict(), shapes_of(UNet, config))
    model = UNet(config)
    model.load_state_dict(state)
    return model


def unet_to_diffusers(model: UNet) -> Any:
    """The same network as a `diffusers.UNet2DModel`, in float32 on the CPU. Raises UserError without diffusers."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise UserError("diffusers is not installed; run `pip install diffusers`.") from error
    other: Any = UNet2DModel(**unet_config_to_diffusers(model.config))
    other.load_state_dict(state_to_diffusers(model.state_dict()))
    return other


def save_diffusers_pipeline(
    model: UNet, folder: Path, *, schedule: str, timesteps: int, objective: str = "eps",
    zero_terminal_snr: bool = False, time_scale: float = 1.0, latents: bool = False,
) -> None:  # fmt: skip
    """Write a folder that `diffusers.DDPMPipeline.from_pretrained` loads, and that draws as our `ddpm` does.

    `DDIMPipeline.from_pretrained` loads it as well, and draws as our `ddim` with use_clipped_model_output=True.
    A network with classes or of latents comes with a pipeline of its own, see `fastdiff/interop_pipeline.py`.

    Args:
        folder: made if missing; files of the same names are replaced.
        schedule, timesteps, objective, zero_terminal_snr, time_scale: of the training, see `scheduler_to_diffusers`.
        latents: it draws latents, which an AutoencoderKL in the folder `vae` decodes; and which have no bounds.

    Raises:
        UserError: diffusers has no counterpart; nothing is written.
    """
    scheduler = scheduler_to_diffusers(
        objective=objective, schedule=schedule, timesteps=timesteps, zero_terminal_snr=zero_terminal_snr,
        time_scale=time_scale,
    )  # fmt: skip
    if model.config.text_encoder != "none":
        raise not_exported("a network that reads texts", "UNet2DModel has none")
    if latents:
        scheduler["clip_sample"] = False
    own = latents or model.config.num_classes > 0
    index = {
        "_class_name": "ConditionalPipeline" if own else "DDPMPipeline",
        **({"vae": ["diffusers", "AutoencoderKL"]} if latents else {}),
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    for name, content in (
        ("model_index.json", index),
        ("unet/config.json", {"_class_name": "UNet2DModel", **unet_config_to_diffusers(model.config)}),
        ("scheduler/scheduler_config.json", {"_class_name": "DDPMScheduler", **scheduler}),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    if own:
        shutil.copyfile(Path(__file__).with_name("interop_pipeline.py"), folder / "pipeline.py")
    save_file(state_to_diffusers(model.state_dict()), folder / "unet" / WEIGHTS[0])

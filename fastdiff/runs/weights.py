"""Averaged weights as they were saved: in a run, one checkpoint, a folder of `export`, or by diffusers."""

import dataclasses
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastdiff.config import Config
from fastdiff.data.datasets import expanded
from fastdiff.errors import UserError
from fastdiff.interop import check_shapes, read_diffusers, read_json, read_tensors, shapes_of
from fastdiff.interop_autoencoder import read_autoencoder
from fastdiff.model_sections import UNetConfig
from fastdiff.nets.autoencoder import Autoencoder
from fastdiff.nets.unet import UNet
from fastdiff.runs import checkpoint
from fastdiff.words import counted


def weights_sha256(state: Mapping[str, Tensor], more: str = "") -> str:
    """SHA-256 (hex) of names and values, and of more that counts."""
    digest = hashlib.sha256(more.encode())
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class TrainedWeights:
    """What one of our runs has trained."""

    config: Config
    state: dict[str, Tensor]  # averaged weights, on the CPU
    step: int  # updates made
    path: Path  # the checkpoint's folder, or the exported one
    run: Path | None  # the run directory of a checkpoint that lies in one
    rest: dict[str, Any]  # of the checkpoint's state, without tensors; {} of an exported folder


def read_trained(path: Path | str) -> TrainedWeights:
    """Read a run's newest checkpoint, one `step-N` folder, or what `export --to safetensors` wrote.

    Raises UserError if nothing is there, or nothing verifies.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        found = checkpoint.load_latest(path / "checkpoints")
    elif (path / "manifest.json").is_file():
        found = checkpoint.load(path)
    elif _is_export(path):
        return _read_export(path)
    else:
        raise UserError(
            f"{path} is neither a run directory nor a checkpoint, nor a folder of `export --to safetensors`; name one "
            "such as working/1 or working/1/checkpoints/step-10000."
        )
    if found is None:
        raise UserError(f"{path} has no checkpoint yet.")
    for skipped, reason in found.skipped:
        print(f"skipped {skipped}: {reason}", file=sys.stderr)
    folder = found.path.resolve().parent.parent
    run = folder if (folder / "config.json").is_file() else None
    rest = {name: value for name, value in found.state.items() if name not in ("model", "ema", "optimizer")}
    return TrainedWeights(Config.from_dict(rest["config"]), found.state["ema"], found.step, found.path, run, rest)


def _is_export(path: Path) -> bool:
    return (path / "model.safetensors").is_file() and (path / "config.json").is_file()


def _read_export(path: Path) -> TrainedWeights:
    file = path / "model.safetensors"
    values, state = read_json(path / "config.json"), read_tensors(file)
    try:
        config = Config.from_dict(values)
        ours = config.autoencoder
        check_shapes(state, shapes_of(Autoencoder, ours) if ours.factor else shapes_of(UNet, config.net))
        with safe_open(file, framework="pt") as opened:
            step = (opened.metadata() or {}).get("step", "")
        if not step.isdecimal():
            raise UserError(f"{file.name} does not say after which step.")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no folder of `export --to safetensors`: {error}") from error
    return TrainedWeights(config, state, int(step), path, None, {})


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a new run starts from."""

    state: dict[str, Tensor]  # of the network, on the CPU
    source: str  # where they come from, for the user
    warning: str | None  # that they were trained for something else, if so


def initial_weights(config: Config) -> InitialWeights | None:
    """What `--init-from` names, or else `--teacher`, if anything.

    Raises:
        UserError: it cannot be read, or its network has another shape or time scale than the run's.
    """
    named = config.optim.init_from or config.tuning.teacher
    if named is None:
        return None
    path = expanded(named)
    flag, text, latents = f"{'--init-from' if config.optim.init_from else '--teacher'} {path}", "", ""
    if not path.is_dir():
        raise UserError(
            f"{flag} is no folder; name a run, a checkpoint, a folder of `export`, or one of a diffusers pipeline."
        )
    ours = (path / "checkpoints").is_dir() or (path / "manifest.json").is_file() or _is_export(path)
    trained = read_trained(path) if ours else None
    if config.autoencoder.factor or (trained is not None and trained.config.autoencoder.factor):
        return _initial_autoencoder(flag, config, path, trained)
    if trained is not None:
        net, state, task = trained.config.net, trained.state, trained.config.diffusion.task
        names, scale = trained.config.conditions.class_names, trained.config.diffusion.time_scale
        source, text = f"{trained.path}, step {trained.step:,}", trained.config.conditions.text_fingerprint
        latents = trained.config.space.autoencoder_sha256
    else:
        net, state, task = read_diffusers(path, image_size=config.net.image_size)
        source, names, scale = str(path), (), 1.0
    if (here := config.space.autoencoder_sha256) != latents:
        there, here = (f"latents of {each[:12]}..." if each else "pixels" for each in (latents, here))
        raise UserError(f"{flag} was trained on {there}, but this run trains on {here}; choose its --latents.")
    if config.diffusion.time_scale != scale:
        raise UserError(
            f"{flag} was trained with --time-scale {scale:g}, but this run has {config.diffusion.time_scale:g}, by "
            f"which its network would take each noise level for another; add --time-scale {scale:g}."
        )
    pooled = net.text_pooled or config.net.text_pooled  # which begins without effect
    _check_net(flag, config.net, dataclasses.replace(net, text_pooled=pooled))
    if text != config.conditions.text_fingerprint and config.net.text_encoder == "frozen":
        raise UserError(f"{flag} was trained on the tokens of another text encoder; choose its --text.")
    state, labels = _with_labels(flag, config, net, state, theirs=names)
    source, warning = source + labels, None
    if task is not None:
        source += f", trained as {task}"
        if task != config.diffusion.task:
            warning = f"{flag} was trained as {task}, but this run trains {config.diffusion.task}."
    return InitialWeights(state, source, warning)


def _initial_autoencoder(flag: str, config: Config, path: Path, trained: TrainedWeights | None) -> InitialWeights:
    """From one of our runs, or from diffusers. Raises UserError unless both are autoencoders of one shape."""
    if trained is None:
        found = read_autoencoder(path)
        there, state, source = found.config, found.state, str(path)
    else:
        there, state = trained.config.autoencoder, trained.state
        source = f"{trained.path}, step {trained.step:,}"
    here = config.autoencoder
    if 0 in (here.factor, there.factor):
        kinds = [f"an autoencoder of factor {each.factor}" if each.factor else "a network" for each in (there, here)]
        raise UserError(f"{flag} holds {kinds[0]}, but this run trains {kinds[1]}; name a run of the same kind.")
    for name in ("factor", "latent_channels", "base_channels", "blocks"):
        ours, theirs = getattr(here, name), getattr(there, name)
        if ours != theirs:
            as_flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} has {as_flag} {theirs}, but this run has {ours}; add {as_flag} {theirs}.")
    if not here.critic_weight:
        state = {name: value for name, value in state.items() if not name.startswith("critic.")}
    return InitialWeights(state, source, None)


@dataclass(frozen=True)
class TeacherWeights:
    """Averaged weights that a run learns from, on the CPU; where they lie, and what they are."""

    state: dict[str, Tensor]
    path: str
    sha256: str

    @property
    def saved(self) -> dict[str, str]:
        """What a checkpoint keeps of them."""
        return {"teacher_path": self.path, "teacher_sha256": self.sha256}


def teacher_weights(config: Config, saved: Mapping[str, Any]) -> TeacherWeights | None:
    """What `--teacher` names, if anything.

    Args:
        saved: the state of the checkpoint to go on from, which knows the teacher by its content; {} for a new run.

    Raises:
        UserError: it cannot be read, was trained for something else, or is another one than before.
    """
    named, known = config.tuning.teacher, saved.get("teacher_sha256")
    if saved and (named is None) != (known is None):
        raise UserError("--resume cannot add or drop a --teacher, which would change what is trained.")
    if named is None:
        return None
    if saved and named == Config.from_dict(saved["config"]).tuning.teacher:
        named = saved["teacher_path"]
    trained, flag = read_trained(expanded(named)), f"--teacher {named}"
    if (few := trained.config.tuning.few_step) != "none":
        raise UserError(f"{flag} was trained with --few-step {few}, which leaves no flow to follow; name its teacher.")
    ours, theirs = config.task, trained.config.task
    if ours != theirs:
        raise UserError(
            f"{flag} was trained as {', '.join(theirs)}, but this run trains {', '.join(ours)}; a teacher has the same "
            "objective, schedule, text encoder and classes."
        )
    _check_net(flag, config.net, trained.config.net)
    sha256 = weights_sha256(trained.state)
    if known not in (None, sha256):
        raise UserError(f"{flag} holds other weights than those that the run has learned from; restore them.")
    return TeacherWeights(trained.state, str(trained.path.resolve()), sha256)


def _check_net(flag: str, here: UNetConfig, there: UNetConfig) -> None:
    """Raise UserError where the shapes differ."""
    if there.two_times and not here.two_times:
        raise UserError(f"{flag} was trained for two times; only --few-step flow-map and mean-flow can start from it.")
    if here.text_encoder != there.text_encoder:
        told = {"none": "no texts", "bytes": "--text bytes", "words": "--text words", "frozen": "a frozen text encoder"}
        raise UserError(
            f"{flag} holds a network with {told[there.text_encoder]}, but this run has "
            f"{told[here.text_encoder]}; choose --text as there."
        )

    free = {"dropout", "num_classes"}  # the one has no weights, the other's rows are `_with_labels`' concern
    if here.two_times:
        free.add("two_times")  # which begins without effect
    if here.text_encoder == "none":
        free |= {"text_width", "text_blocks", "text_pooled"}

    def fields(net: UNetConfig) -> dict[str, object]:
        values = {**vars(net), "attention_resolutions": tuple(sorted(set(net.attention_resolutions)))}
        return {f"--{name.replace('_', '-')}": value for name, value in values.items() if name not in free}

    theirs = fields(there)
    if wrong := {name: value for name, value in fields(here).items() if value != theirs[name]}:
        listed = "; ".join(f"{name} is {value} here, {theirs[name]} there" for name, value in wrong.items())
        added = " ".join(_as_flag(name, theirs[name]) for name in wrong)
        raise UserError(f"{flag} holds a network of another shape: {listed}. Add {added}.")


def _with_labels(
    flag: str, config: Config, there: UNetConfig, state: dict[str, Tensor], *, theirs: tuple[str, ...]
) -> tuple[dict[str, Tensor], str]:
    """The weights with a row for each class of the run and one for none, zero where they have none; and what was done.

    diffusers' networks need not have a row for no class, so that one more class than we count may be meant. Raises
    UserError for other classes.
    """
    here, ours = config.net.num_classes, config.conditions.class_names
    if here == there.num_classes and (not theirs or theirs == ours):
        return state, ""
    if here and here == there.num_classes:
        raise UserError(f"{flag} was trained on the classes {', '.join(theirs)}, not {', '.join(ours)}.")
    if here and there.num_classes == 0:
        rows = torch.zeros(here + 1, 4 * config.net.channels)
        return {**state, "label.weight": rows}, ", without classes"
    if here and not theirs and here == there.num_classes + 1:
        rows = state["label.weight"]
        return {**state, "label.weight": torch.cat([rows, torch.zeros_like(rows[:1])])}, ", without a row for no class"
    classes = counted(there.num_classes, "class", "classes")
    advice = f"use data of {classes}" if here else "add --conditional"
    raise UserError(f"{flag} holds a network of {classes}, but this run has {here}; {advice}.")


def _as_flag(flag: str, value: object) -> str:
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    return " ".join([flag, *map(str, value if isinstance(value, tuple) else (value,))])

"""The images of a run, known by their content: where they lie and what they are called may change."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastdiff.config import Config
from fastdiff.data.datasets import BUILT_IN, ImageSet, load_dataset
from fastdiff.data.layout import some
from fastdiff.errors import UserError
from fastdiff.nets.frozen_text import frozen_encoder
from fastdiff.nets.text import READERS


def load_run_data(config: Config, saved: Mapping[str, Any], *, split: Any = None) -> tuple[ImageSet, dict[str, Any]]:
    """Load the images of a run: from where its checkpoint says they were, else by their name, seen from here.

    Args:
        config: of the run; a `data` that is not the checkpoint's says where the images are now.
        saved: the state of the checkpoint to go on from, or to measure; {} for a new run.
        split: "train" or "test", by default the run's; the content of another one is not known, and not compared.

    Returns:
        The images, under the name that they had first; and what a checkpoint is to keep of them.

    Raises:
        UserError: there are none, or others.
    """
    split = split or config.images.split
    sha256 = saved.get("data_sha256", "") if split == config.images.split else ""
    places = [config.images.data]
    if saved and config.images.data == Config.from_dict(saved["config"]).images.data:
        places = [saved.get("data_path") or config.images.data, config.images.data]
    there = [place for place in dict.fromkeys(places) if os.path.exists(_path(place) or ".")]
    if saved and not there:
        raise UserError(
            f"--data {config.images.data} is not there, seen from {os.getcwd()}; if the images have moved, add --data "
            "and their new place."
        )
    for place in there or places:
        images = load_dataset(
            place, root=config.images.data_root, split=split, image_size=config.pixels,
            captions=config.conditions.text != "none" and (config.conditions.captions or True),
        )  # fmt: skip
        if sha256 in ("", images.sha256):
            break
    else:
        count = f"{saved['data_images']:,}, " if "data_images" in saved else ""
        raise UserError(
            f"--data {place} holds other images ({len(images.images):,}, SHA-256 {images.sha256[:12]}...) than the run "
            f"was trained on ({count}SHA-256 {sha256[:12]}...); restore them, or add --data and their new place."
        )
    if sha256:
        images = dataclasses.replace(images, name=saved.get("data_name", images.name))
    if sha256 and saved.get("captions_sha256") != images.captions_sha256:
        raise UserError(f"--data {place} has other captions than those that the run was trained on; restore them.")
    return images, {
        "captions_sha256": images.captions_sha256,
        "data_sha256": images.sha256, "data_images": len(images.images), "data_name": images.name,
        "data_path": _path(place),
    }  # fmt: skip


def with_conditions(config: Config, images: ImageSet) -> Config:
    """The config with the classes of its data, which a run keeps, and `with_inputs`.

    Raises UserError for a conditional run on data without classes.
    """
    if config.conditions.captions is not None:
        config = config.replace(captions=_path(config.conditions.captions))
    return with_inputs(_with_classes(config, images))


def with_inputs(config: Config) -> Config:
    """The config with what its flags say of the network's inputs: the text encoder, a second time.

    Raises UserError for a text encoder that cannot be had.
    """
    config, name = config.replace(two_times=config.tuning.two_times), config.conditions.text
    if name == "none":
        return config
    if name in READERS:
        return config.replace(text_encoder=name)
    encoder = frozen_encoder(name)
    known = config.conditions.text_fingerprint or encoder.fingerprint  # `text_reader` compares it
    return config.replace(text_encoder="frozen", text_width=encoder.width, text_fingerprint=known)


def _with_classes(config: Config, images: ImageSet) -> Config:
    if not config.conditions.conditional or config.conditions.class_names:
        return config
    if images.labels is None:
        raise UserError(
            f"--conditional needs classes, but {images.name} has none; sort the images into one folder for each class, "
            "use an .npz with `labels`, or add --no-conditional --eval-guidance 1."
        )
    names = images.class_names or tuple(map(str, range(int(images.labels.max()) + 1)))
    counts = np.bincount(images.labels, minlength=len(names))
    if missing := [name for name, count in zip(names, counts, strict=True) if count == 0]:
        raise UserError(f"--conditional needs images of each class, but {images.name} has none of {some(missing, 5)}.")
    if len(names) < 2:
        raise UserError(f"--conditional needs at least 2 classes, but all images of {images.name} are of one.")
    return config.replace(class_names=names, num_classes=len(names))


def _path(data: str) -> str | None:
    """Where it is, from any folder; None for a set that has a name of its own."""
    return None if data in BUILT_IN else os.path.abspath(os.path.expanduser(data))

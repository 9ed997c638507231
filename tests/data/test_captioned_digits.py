"""`digits-captioned`: captions say what the pictures show, as its readers measure."""

import numpy as np
import pytest

from fastdiff.data.captioned_digits import BACKGROUNDS, COLOURS, POSITIONS, held_out_pairs, named
from fastdiff.data.datasets import load_dataset
from fastdiff.evaluation.attributes import agreement, read_attributes
from fastdiff.sections import ImagesConfig


@pytest.fixture(scope="module")
def sets():
    return {split: load_dataset("digits-captioned", split=split, image_size=16) for split in ("train", "test")}


def subset(data, n=600):
    chosen = data.draw(n, seed=0)
    return data.images[chosen], [data.captions[i] for i in chosen], data.labels[chosen]


def test_a_tenth_of_the_pairs_is_kept_for_the_test_split(sets):
    pairs = {split: {(int(d), named(c[0])["colour"]) for d, c in zip(data.labels, data.captions, strict=True)}
             for split, data in sets.items()}  # fmt: skip
    assert pairs["test"] == set(held_out_pairs())
    assert len(pairs["test"]) == 7
    assert len(pairs["train"] | pairs["test"]) == 70
    assert not pairs["train"] & pairs["test"]
    assert held_out_pairs() == held_out_pairs()
    assert len(sets["train"].images) + len(sets["test"].images) == 17_970


def test_captions_name_the_attributes_and_fit_64_positions(sets):
    data = sets["train"]
    assert data.class_names[data.labels[0]] in data.captions[0][0]
    assert all(len(captions) == 5 and max(map(len, captions)) <= 62 for captions in data.captions)
    assert {c for captions in data.captions for c in captions} >= {"a red three", "an orange five at the top"}
    assert named("A red three, on WHITE at the left.") == {"digit": 3, "colour": 0, "background": 0, "position": 1}
    assert named("a photograph") == {}
    flags = {**dict.fromkeys(COLOURS), **dict.fromkeys(BACKGROUNDS), **dict.fromkeys(POSITIONS)}
    assert len(flags) == len(COLOURS) + len(BACKGROUNDS) + len(POSITIONS)  # no word names two attributes


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("noise", [0, 12])
def test_readers_read_what_captions_say(sets, split, noise):
    """The ceiling of every accuracy that is measured on samples; noise stands for what a network leaves."""
    images, captions, labels = subset(sets[split])
    noisy = images + np.random.default_rng(0).normal(0, noise, images.shape)
    images = noisy.round().clip(0, 255).astype(np.uint8)
    shares = agreement(images, [each[3] for each in captions])
    assert set(shares) == {"digit", "colour", "background", "position"}
    assert min(shares["colour"], shares["background"], shares["position"]) > 0.995
    assert shares["digit"] > 0.98
    assert (read_attributes(images).digit == labels).mean() == shares["digit"]


def test_readers_do_not_agree_with_other_captions(sets):
    images, captions, _ = subset(sets["train"])
    shares = agreement(images, [each[4] for each in captions[::-1]])
    assert shares["digit"] < 0.15
    assert shares["colour"] < 0.22
    assert shares["position"] < 0.28
    assert set(agreement(images, ["a red thing"] * 600)) == {"colour"}


def test_other_sizes_and_what_runs_do_with_the_set(sets, user_error):
    assert load_dataset("digits-captioned", image_size=16).sha256 == sets["train"].sha256
    assert not ImagesConfig(data="digits-captioned").flips  # left stays left
    user_error(lambda: load_dataset("digits-captioned", image_size=15), "image_size is 15", "at least 16")
    assert "4, 'colour'" not in sets["train"].describe()
    assert "all but held-out pairs" in sets["train"].describe()


@pytest.mark.lab
@pytest.mark.parametrize("size", [19, 32])
def test_pictures_of_other_sizes_are_read_as_well(size):
    images, captions, _ = subset(load_dataset("digits-captioned", image_size=size))
    shares = agreement(images, [each[3] for each in captions])
    assert min(shares["colour"], shares["background"], shares["position"]) > 0.995
    assert shares["digit"] > 0.98

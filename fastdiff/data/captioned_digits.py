"""Handwritten digits with a colour, a background and a position, and captions that name them.

Every word of a caption names one attribute of its picture, so that samples can be checked by measuring it
(`fastdiff.evaluation.attributes`). Some pairs of digit and colour never occur in training: a network that draws them
when it is asked has learnt the words, not the pictures.
"""

import re
from typing import NamedTuple

import numpy as np

from fastdiff.data.cache import new_images
from fastdiff.data.captions import Captions
from fastdiff.data.digits import enlarged, load_greys
from fastdiff.errors import UserError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {  # of the digit, RGB
    "red": (220, 30, 30), "orange": (255, 140, 0), "yellow": (250, 230, 40), "green": (30, 160, 50),
    "blue": (40, 70, 230), "purple": (140, 40, 180), "pink": (255, 130, 190),
}  # fmt: skip
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128), "brown": (90, 50, 20),
               "cyan": (140, 230, 230)}  # fmt: skip
POSITIONS = {  # row and column of the digit's upper left corner, in halves of the room beside it
    "centre": (1, 1), "left": (1, 0), "right": (1, 2), "top": (0, 1), "bottom": (2, 1),
}  # fmt: skip
TEMPLATES = (
    "{a} {colour} {digit}",
    "{a} {colour} {digit} {place}",
    "{a} {colour} {digit} on {background}",
    "{a} {colour} {digit} on {background} {place}",
    "{digit}, {colour}, on {background}, {place}",
)
COPIES = 10  # pictures of each handwritten digit in the training set
SMALLEST = 16  # pixels: a digit has 10 of them, and its strokes need 8


class Attributes(NamedTuple):
    """What each picture shows, int64 (N,) each: `digit` in 0..9, the others by their order in the tables above."""

    digit: np.ndarray
    colour: np.ndarray
    background: np.ndarray
    position: np.ndarray


WORDS = (DIGITS, tuple(COLOURS), tuple(BACKGROUNDS), tuple(POSITIONS))  # of each attribute


def held_out_pairs() -> tuple[tuple[int, int], ...]:
    """(digit, colour) of the pairs that training never sees: one for each colour, a tenth of all."""
    digits = np.random.default_rng(0).permutation(len(DIGITS))[: len(COLOURS)]
    return tuple(zip(digits.tolist(), range(len(COLOURS)), strict=True))


def draw_attributes(split: str) -> tuple[np.ndarray, Attributes]:
    """Which handwritten digit each picture is made of, int64 (N,) in 0..1796, and its attributes.

    "train" has every pair of digit and colour but the held-out ones, "test" these alone.
    """
    _, labels = load_greys()
    rng = np.random.default_rng(0)
    source = np.tile(np.arange(len(labels)), COPIES)
    colour, background, position = (rng.integers(0, len(words), len(source)) for words in WORDS[1:])
    held_out = np.zeros((len(DIGITS), len(COLOURS)), dtype=bool)
    held_out[tuple(zip(*held_out_pairs(), strict=True))] = True
    kept = held_out[labels[source], colour] == (split == "test")
    return source[kept], Attributes(labels[source][kept], colour[kept], background[kept], position[kept])


def render(source: np.ndarray, attributes: Attributes, size: int) -> np.ndarray:
    """The pictures, uint8 (N, size, size, 3): digits mixed into the background by their grey."""
    if size < SMALLEST:
        raise UserError(f"image_size is {size}; digits-captioned needs at least {SMALLEST}, 10 for a digit")
    side = digit_side(size)
    inks = np.stack([enlarged(grey, side) for grey in load_greys()[0]])[..., None] / 255
    colours, backgrounds = (np.array(list(table.values()), np.float32) for table in (COLOURS, BACKGROUNDS))
    images = new_images(len(source), size)
    images[:] = backgrounds[attributes.background][:, None, None]
    for i, (row, column) in enumerate(corners(size)[attributes.position]):
        ink, back = inks[source[i]], backgrounds[attributes.background[i]]
        mixed = ink * colours[attributes.colour[i]] + (1 - ink) * back
        images[i, row : row + side, column : column + side] = np.rint(mixed)
    return images


def digit_side(size: int) -> int:
    """Height and width of a digit in a picture of `size` pixels."""
    return size * 5 // 8


def corners(size: int) -> np.ndarray:
    """Row and column of the digit's upper left corner at each position, in pixels: int64 (5, 2)."""
    return np.array(list(POSITIONS.values())) * (size - digit_side(size)) // 2


def named(text: str) -> dict[str, int]:
    """The attributes that a caption or a prompt names, by their numbers: "a red three" -> digit 3 and colour 0."""
    numbers = {
        word: (field, i) for field, words in zip(Attributes._fields, WORDS, strict=True) for i, word in enumerate(words)
    }
    return dict(numbers[word] for word in re.findall("[a-z]+", text.lower()) if word in numbers)


def captioned_digits(split: str, size: int) -> tuple[np.ndarray, np.ndarray, Captions]:
    """Images uint8 (N, size, size, 3), labels int64 (N,), the digits, and captions by every template."""
    source, attributes = draw_attributes(split)
    shown = list(zip(*(values.tolist() for values in attributes), strict=True))
    made = {each: _captions(*(words[i] for words, i in zip(WORDS, each, strict=True))) for each in set(shown)}
    return render(source, attributes, size), attributes.digit, tuple(made[each] for each in shown)


def _captions(digit: str, colour: str, background: str, position: str) -> tuple[str, ...]:
    a = "an" if colour[0] in "aeiou" else "a"
    place = "in the centre" if position == "centre" else f"at the {position}"
    return tuple(each.format(a=a, digit=digit, colour=colour, background=background, place=place) for each in TEMPLATES)

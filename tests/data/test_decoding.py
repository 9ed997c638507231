"""Single images of every kind, and the parallel decoder's order, errors and progress."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.data import decoding
from fastdiff.data.decoding import decode, decode_all, in_parallel, resize_all


def encoded(image: Image.Image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_an_image_of_the_right_size_is_untouched():
    pixels = random_pixels(7, 7, 3)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels)), 7), pixels)


@pytest.mark.parametrize("format", decoding.FORMATS)
def test_every_format(format):
    flat = decode(encoded(Image.new("RGB", (9, 9), (200, 100, 50)), format), 9)
    assert np.abs(flat.astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize(("width", "height"), [(16, 8), (8, 16), (17, 8), (8, 23)])
def test_the_shorter_side_is_resized_and_the_centre_cropped(width, height):
    """A square in the middle, of another colour than the rest, is what remains."""
    pixels = np.zeros((height, width, 3), np.uint8)
    left, top = (width - 8) // 2, (height - 8) // 2
    pixels[top : top + 8, left : left + 8] = 255
    middle = decode(encoded(Image.fromarray(pixels)), 4)
    assert middle.shape == (4, 4, 3)
    assert middle[1:3, 1:3].min() > 240
    assert middle.mean() > 220


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = decode(encoded(Image.fromarray(stripes)), 8).astype(int)
    assert np.abs(small - 127).max() <= 12  # without a filter: all black or all white


def test_grey_palette_cmyk_and_16_bits_become_rgb():
    grey = random_pixels(5, 5)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey)), 5), rgb)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey).convert("P")), 5), rgb)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey.astype(np.uint16) * 257)), 5), rgb)
    assert decode(encoded(Image.new("CMYK", (5, 5)), "JPEG"), 5).min() > 250
    assert decode(encoded(Image.new("1", (5, 5), 1)), 5).min() == 255


def tiff(pixels: np.ndarray, bits: int) -> bytes:
    """Grey (8, 8) as a TIFF of 16 or 12 bits a pixel; Pillow writes no 12."""
    data = pixels.astype("<u2").tobytes()
    if bits == 12:
        data = int("".join(f"{value:03x}" for value in pixels.flat), 16).to_bytes(96, "big")
    short = {256: 8, 257: 8, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(data)}  # tag -> value
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in short.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", 9) + entries + bytes(4)


def png_rgb16(pixels: np.ndarray) -> bytes:
    """RGB (8, 8, 3) as a PNG of 16 bits a channel, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


SIXTEEN = {
    "png": lambda grey: encoded(Image.fromarray(grey)),
    "png rgb": lambda grey: png_rgb16(np.repeat(grey[..., None], 3, axis=2)),
    "tiff": lambda grey: tiff(grey, 16),
    "pgm": lambda grey: b"P5 8 8 65535\n" + grey.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("kind", SIXTEEN)
def test_12_bits_in_16_are_remarked_on(kind):
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    remarks = []
    np.testing.assert_array_equal(decode(SIXTEEN[kind](grey), 8, remarks.append)[..., 0], grey >> 8)
    assert remarks == []
    assert decode(SIXTEEN[kind](grey >> 4), 8, remarks.append).max() == 15
    assert remarks == [decoding.DARK]


def test_where_the_file_says_12_bits_they_fill_the_range():
    grey = np.arange(64).reshape(8, 8) * 65
    remarks = []
    np.testing.assert_array_equal(decode(tiff(grey, 12), 8, remarks.append)[..., 0], grey >> 4)
    pgm = decode(b"P5 8 8 4095\n" + grey.astype(">u2").tobytes(), 8, remarks.append)
    assert np.abs(pgm[..., 0].astype(int) - grey / 16.06).max() < 1
    assert remarks == []


def test_remarks_are_counted_and_name_the_first():
    frames = encoded(Image.new("L", (8, 8), 9), "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 99)])
    dark = SIXTEEN["png"](np.full((8, 8), 4095, np.uint16))
    items = [(i, f"{i}.gif", frames if i == 6 else dark if i < 5 else SIXTEEN["png"](np.full((8, 8), 4096, np.uint16)))
             for i in range(8)]  # fmt: skip
    images, remarks = decode_all(items, 8, 8, Path("set"))
    assert (images[6] == 9).all()
    assert sorted(remarks) == [
        "1 of 8 images: several frames; only the first is used ('6.gif')",
        f"5 of 8 images: {decoding.DARK} ('0.gif', '1.gif', '2.gif' and 2 more)",
    ]


def test_the_transparent_lies_on_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 2, 4))
    pixels = decode(encoded(image), 4)
    assert (pixels[:, :2] == (0, 0, 255)).all()
    assert (pixels[:, 2:] == 255).all()
    palette = decode(encoded(Image.new("P", (4, 4)), transparency=0), 4)
    assert (palette == 255).all()


def test_exif_orientation_turns_the_image_upright():
    image = Image.fromarray(random_pixels(6, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise by 90 degrees
    turned = decode(encoded(image, exif=exif), 6)
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        encoded(Image.fromarray(random_pixels(64, 64, 3)))[:4000],
        encoded(Image.fromarray(random_pixels(64, 64, 3)), "JPEG")[:900],
        encoded(Image.fromarray(random_pixels(64, 64, 3)), "JPEG")[:-200],
        encoded(Image.fromarray(random_pixels(64, 64, 3)), "GIF")[:2000],
        encoded(Image.new("RGB", (4, 4)), "PCX"),
        encoded(Image.new("F", (4, 4)), "TIFF"),
    ],
    ids=["empty", "text", "cut PNG", "cut JPEG", "end of JPEG", "cut GIF", "not of FORMATS", "float"],
)
def test_what_is_no_sound_image_is_a_value_error(data):
    with pytest.raises(ValueError, match=r"\w"):
        decode(data, 8)


def test_a_small_file_of_too_many_pixels_is_refused(monkeypatch):
    bomb = encoded(Image.new("1", (300, 300)))
    decode(bomb, 8)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 300 * 300 - 1)
    with pytest.raises(ValueError, match="300 x 300"):
        decode(bomb, 8)


def test_decode_all_keeps_places_and_names_the_bad_one(tmp_path, user_error):
    pixels = random_pixels(200, 5, 5, 3)
    items = [(i, f"{i}.png", encoded(Image.fromarray(pixels[i]))) for i in range(200)]
    (tmp_path / "0.png").write_bytes(items[0][2])
    items[0] = (0, "0.png", tmp_path / "0.png")
    images, remarks = decode_all(reversed(items), 200, 5, Path("set"))
    np.testing.assert_array_equal(images, pixels)
    assert remarks == []
    items[150] = (150, "bad\n.png", b"junk")
    items[20] = (20, "gone.png", tmp_path / "gone.png")
    items[170] = (170, "crc.png", ValueError("Bad CRC-32"))
    message = user_error(
        lambda: decode_all(items, 200, 5, Path("set")),
        "set: 3 of 200 files",
        r"'bad\n.png' (it is not",
        "replace or delete",
    )
    assert message.index("'gone.png' (No such file or directory)") < message.index("bad") < message.index("Bad CRC-32")


def test_the_first_ten_bad_files_are_named_at_once(user_error):
    items = [(i, f"{i:02}.png", b"junk") for i in range(12)]
    message = user_error(
        lambda: decode_all(items, 12, 5, Path("set")), "12 of 12 files", "'00.png' (", "'09.png' (", "and 2 more"
    )
    assert "'10.png'" not in message


def test_resize_all_equals_decoding():
    arrays = random_pixels(40, 9, 12, 3)
    resized = resize_all(arrays, 6)
    np.testing.assert_array_equal(resized[7], decode(encoded(Image.fromarray(arrays[7])), 6))
    assert resize_all(arrays[:, :, :9], 9).flags.c_contiguous
    grey = resize_all(arrays[..., 0], 9)
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])


def test_images_beyond_the_memory_are_a_user_error(user_error):
    user_error(lambda: resize_all(random_pixels(2, 4, 4, 3), 10**7), "GiB", "smaller image size")


def test_in_parallel_draws_its_items_only_a_little_ahead():
    drawn = []

    def items():
        for i in range(10_000):
            drawn.append(i)
            yield i

    results = in_parallel(lambda i: i * i, items(), 10_000, "squaring")
    assert [next(results) for _ in range(100)] == [i * i for i in range(100)]
    assert len(drawn) < 5000
    results.close()


def test_progress_goes_to_a_terminal_s_stderr_only(monkeypatch, capsys):
    list(in_parallel(str, range(100), 100, "working"))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    monkeypatch.setenv("TERM", "xterm")
    list(in_parallel(str, range(100), 100, "working"))
    out, err = capsys.readouterr()
    assert out == ""
    assert "working" in err
    assert "100/100" in err

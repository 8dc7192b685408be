"""Sheets: blocks of images under their captions. Pictures that people have."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from twinflow_jax import images


def test_a_caption_wider_than_its_block_moves_the_next_block():
    """One column of 8 pixels; under white paper only the second block is dark."""
    bright, dark = np.ones((2, 8, 8, 3)), -np.ones((2, 8, 8, 3))
    sheets = [
        np.asarray(images.sheet({caption: bright, "b": dark}, 1))
        for caption in ("a", "a caption that is much wider than its block of pictures" * 4)
    ]
    below = [sheet[60].max(axis=-1) for sheet in sheets]
    starts = [np.flatnonzero(columns < 50)[0] for columns in below]
    assert starts[0] < 300 and starts[1] > 1000
    assert all(sheet.shape[1] > start for sheet, start in zip(sheets, starts, strict=True))


def test_long_captions_of_rows_are_broken_and_shortened():
    blocks = {"a": np.ones((2, 8, 8, 3))}
    captions = ["a cat on a wall " * 190, "one\nline"]
    made = images.sheet(blocks, 1, rows=captions)
    short = images.sheet(blocks, 1, rows=["a cat", "one line"])
    assert made.width < short.width + 500 and made.height == short.height
    assert images.sheet(blocks, 1, rows=[captions[1]] * 2).width == images.sheet(
        blocks, 1, rows=["one line"] * 2
    ).width


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_what_a_png_says_beside_its_pixels_does_not_matter():
    """Texts and profiles of megabytes, compressed or not; damage and what is up still count."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 4), np.uint8)
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    info.add_itxt("prompt", "y" * 3_000_000, zip=True)
    for _ in range(70):
        info.add_text("more", "z" * 1_000_000)
    picture = Image.fromarray(pixels)
    data = saved(picture, "PNG", pnginfo=info, icc_profile=b"p" * 3_000_000)
    assert np.array_equal(np.asarray(images.opened(data + b"more")), pixels)
    with pytest.raises(OSError, match="truncated"):
        images.opened(data[:-200]).load()
    late = saved(picture, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(turned) - 4) + turned + struct.pack(">I", zlib.crc32(turned))
    late = late[:-12] + chunk + late[-12:]
    assert images.opened(late).getexif()[0x0112] == 6


def test_formats_that_run_programs_are_no_pictures():
    with pytest.raises(ValueError, match="^it is none of PNG, JPEG, [^<]*$"):
        images.opened(saved(Image.new("RGB", (8, 8)), "EPS"))


def test_more_pixels_than_are_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    data = saved(Image.new("RGB", (40, 30)), "PNG")
    with pytest.raises(images.TooLarge, match="^it has more than 1,000 pixels$"):
        images.opened(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert images.opened(data).size == (40, 30)

"""Samples as pictures: PNG files and labelled sheets, settings kept in the PNG's text."""

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from twinflow_jax import files

# Pillow's names of what is read; it knows formats that run programs, as EPS does.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000")
PNG, UNUSED = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
ORIENTED = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that may say what is up
ORIENTED_BYTES = 1 << 16  # of those that are read
LONGEST = 16_384  # pixels a side of a picture that is edited
MARGIN, LINE = 4, 90
LETTERS, LEADING = 60, 20  # in a line of a row's text; pixels from one line to the next


class TooLarge(ValueError):
    """A picture of more pixels than Pillow decodes."""


def opened(data: bytes) -> Image.Image:
    """A picture from its file's bytes, of which only the start is read.

    Raises:
      TooLarge: it has too many pixels.
      Exception: of many kinds, where they are no picture.
    """
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        return Image.open(io.BytesIO(_essential(data)), formats=formats)
    except UnidentifiedImageError as error:  # it names an address in memory
        raise ValueError(f"it is none of {', '.join(formats)}") from error
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise TooLarge(f"it has more than {most:,} pixels") from error


def _essential(data: bytes) -> bytes:
    """A PNG without its texts and its colour profile, its orientation before its pixels.

    These are unpacked when a PNG is opened, and their size is limited for that: a picture does not
    fail for what nobody asks for. Bytes of anything else as they are.
    """
    if not data.startswith(PNG):
        return data
    view, first, others, start, kind = memoryview(data), [], [], len(PNG), b""
    while start < len(data) and kind != b"IEND":
        kind = data[start + 4 : start + 8]
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        turns = kind == b"eXIf" or (
            kind in UNUSED and data.startswith(ORIENTED, start + 8) and end - start < ORIENTED_BYTES
        )
        if turns or not first:  # the header stays the first of all
            first.append(view[start:end])
        elif kind not in UNUSED:
            others.append(view[start:end])
        start = end
    return b"".join([PNG, *first, *others])


def rgb(picture: Image.Image) -> Image.Image:
    """A picture of any kind in RGB, on white.

    Raises:
      ValueError: its pixels are numbers without a known range.
    """
    if picture.mode.startswith("I;16"):  # Pillow would clip it
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are numbers without a known range (mode {picture.mode})")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def to_uint8(x: Float[np.ndarray, "... C"]) -> UInt8[np.ndarray, "... 3"]:
    """Pixels of images in [-1, 1], clamped; one channel becomes three."""
    pixels = np.round((np.clip(np.asarray(x, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def tile(x: Float[np.ndarray, "N H W C"], columns: int) -> UInt8[np.ndarray, "H_all W_all 3"]:
    """Images in rows of `columns`, one grey pixel between them."""
    pixels = np.pad(to_uint8(x), ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=LINE)
    rows = -(-len(pixels) // columns)
    blank = np.full((rows * columns - len(pixels), *pixels.shape[1:]), LINE, np.uint8)
    pixels = np.concatenate([pixels, blank])
    height, width = pixels.shape[1:3]
    pixels = pixels.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return pixels.reshape(rows * height, columns * width, 3)


def sheet(
    blocks: dict[str, Float[np.ndarray, "_ H W C"]], columns: int, title: str = "",
    rows: Sequence[str] = (),
) -> Image.Image:
    """Blocks of images side by side, each under its caption, enlarged to be looked at.

    rows: what the rows show, written before them as far as there is room; a block may then have
    fewer columns.
    """
    tiles = [tile(x, len(x) // len(rows) if rows else columns) for x in blocks.values()]
    scale = max(1, round(220 / max(t.shape[1] for t in tiles)))
    tiles = [np.kron(t, np.ones((scale, scale, 1), np.uint8)) for t in tiles]
    font = ImageFont.load_default(14)
    head = 22 + (22 if title else 0)
    room = max(tiles[0].shape[0] // (max(len(rows), 1) * LEADING), 1)
    rows = [textwrap.wrap(row, LETTERS, max_lines=room, placeholder=" ...") for row in rows]
    written = [int(font.getlength(line)) + 2 * MARGIN for row in rows for line in row]
    left = MARGIN + max(written, default=0)
    widths = [  # a caption may be wider than its block
        max(t.shape[1], int(font.getlength(caption)) + 2 * MARGIN) + MARGIN
        for caption, t in zip(blocks, tiles, strict=True)
    ]
    width = sum(widths) + left
    picture = Image.new("RGB", (width, head + max(t.shape[0] for t in tiles) + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((MARGIN + 2, 3), title, fill="black", font=font)
    for i, row in enumerate(rows):
        middle = head + (2 * i + 1) * tiles[0].shape[0] // (2 * len(rows))
        draw.text((MARGIN + 2, middle), "\n".join(row), fill="black", font=font, anchor="lm")
    for caption, pixels, step in zip(blocks, tiles, widths, strict=True):
        draw.text((left + 2, head - 19), caption, fill="black", font=font)
        picture.paste(Image.fromarray(pixels), (left, head))
        left += step
    return picture


def of_figure(figure) -> Image.Image:
    """A matplotlib figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer)


def save(
    path: epath.PathLike, picture: Image.Image, text: dict[str, str] | None = None,
    through: epath.Path | None = None,
) -> None:
    """Writes a PNG with `text` in its text chunks. through: as of `files.whole_file`."""
    files.write(path, png(picture, text), through)


def png(picture: Image.Image, text: dict[str, str] | None = None) -> bytes:
    """A picture as a PNG file with `text` in its text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()

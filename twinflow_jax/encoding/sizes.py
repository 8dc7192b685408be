"""Sizes of pictures: buckets of aspect ratios, and how a picture is brought to one of them."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from twinflow_jax import arguments, images

Size = tuple[int, int]  # (width, height) in pixels
LARGEST = 2**28  # pixels of a picture that is resized: 0.8 GB
WIDEST = 2.0  # of the buckets that are made for an area
ORIENTATION, EXCHANGED = 0x0112, (5, 6, 7, 8)  # the EXIF tag; where it swaps width and height


def name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def buckets(text: str, step: int) -> tuple[Size, ...]:
    """The sizes of `--buckets`: a list of them, or those with about the area of a square.

    step: that sides are multiples of.
    Raises:
      UserError: a size that cannot be read.
    """
    given = tuple(dict.fromkeys(arguments.size(part) for part in text.split(",")))
    if "x" in text or len(given) > 1:
        return given
    return of_area(given[0][0], step)


def of_area(side: int, step: int) -> tuple[Size, ...]:
    """Sizes of about side x side pixels, from 1:2 to 2:1, sides multiples of a 16th of it."""
    unit = max(side // 16 // step, 1) * step
    height = lambda width: max(round(side * side / width / unit), 1) * unit
    longest = round(side * math.sqrt(WIDEST))
    wide = [(width, height(width)) for width in range(unit, longest + 1, unit)]
    wide = [size for size in wide if 1 <= size[0] / size[1] <= WIDEST]
    return tuple(sorted({*wide, *(size[::-1] for size in wide)}))


def nearest(size: Size, choices: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is the nearest, and of those the one nearest in area."""
    area = lambda s: math.log(s[0] * s[1])
    ratio = lambda s: math.log(s[0] / s[1])
    distance = lambda s: (abs(ratio(s) - ratio(size)), abs(area(s) - area(size)))
    return min(choices, key=distance)


def measure(data: bytes) -> Size:
    """Width and height as the picture is to be seen, from its header.

    Raises:
      Exception: of many kinds, where the bytes are no picture.
    """
    with images.opened(data) as picture:
        if picture.format == "TIFF":  # which Pillow turns itself
            return picture.size
        # A PNG's own getexif would decode the pixels, in search of what comes after them.
        turned = Image.Image.getexif(picture).get(ORIENTATION) in EXCHANGED
        return picture.size[::-1] if turned else picture.size


def alike(a: Size, b: Size) -> bool:
    """Whether sizes have the same proportions, within 1 %."""
    return abs(math.log(a[0] * b[1] / (a[1] * b[0]))) <= 0.01


def decode(data: bytes, size: Size, like: Size | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """A picture in RGB, upright, resized so that it covers `size`, and cut at its centre.

    As the published training code does with torchvision: bilinear with antialiasing. What is
    transparent becomes white. like: a size that it is taken to have, so that it is cut as a picture
    of that size is.
    Raises:
      Exception: of many kinds, where the picture is damaged.
    """
    with images.opened(data) as picture:
        picture = images.rgb(ImageOps.exif_transpose(picture))
    (width, height), (found_width, found_height) = size, like or picture.size
    if width * found_height >= height * found_width:
        covering = width, width * found_height // found_width
    else:
        covering = height * found_width // found_height, height
    if covering[0] * covering[1] > LARGEST:
        raise ValueError(f"it is {name(picture.size)}, too long and narrow for {name(size)}")
    if covering != picture.size:
        picture = picture.resize(covering, Image.Resampling.BILINEAR)
    left, top = (round((found - wanted) / 2) for found, wanted in zip(covering, size, strict=True))
    return np.asarray(picture.crop((left, top, left + width, top + height)))

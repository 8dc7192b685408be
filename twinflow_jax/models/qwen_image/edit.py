"""From pictures and an instruction to what Qwen-Image-Edit's text encoder reads.

As in diffusers' QwenImageEditPipeline (`EDIT`) and QwenImageEditPlusPipeline (`PLUS`, of Edit-2509
and Edit-2511): the pictures stand in the prompt, are looked at in a small size, and encoded by the
autoencoder in a large one.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps

from twinflow_jax import images
from twinflow_jax.errors import UserError
from twinflow_jax.models import tokenizers
from twinflow_jax.models.qwen_image import vision

TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or "
    "modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PREFIX = 64  # the tokens of the template before the prompt
NULL_PROMPT = "Edit this image."  # TwinFlow's unconditional instruction
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
MAX_TOKENS = 1024  # of an instruction, and of the template after it
ROUNDED = 64  # tokens
STEP = 32  # pixels that sides of pictures are multiples of
MEGAPIXEL = 1024 * 1024
LEAST, MOST = 28, images.LONGEST  # pixels a side that a picture may have
ASPECT = 200  # the most that one side may be of the other

# Of CLIP's preprocessing, which the vision tower was trained with.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def load_tokenizer(folder: str | os.PathLike):
    """As `prompt.load_tokenizer`, of Qwen-Image-Edit."""
    return tokenizers.load_chat(folder, "Qwen-Image-Edit", TEMPLATE, PREFIX)


def without_pictures(tokenizer, prompts, tokens: int | None = None, negative: bool = False):
    """Raises UserError: a prompt of this family is about pictures."""
    raise UserError(
        "this network edits pictures: only `sample --image` and the suites of edits draw from it"
    )


def upright(picture: Image.Image) -> Image.Image:
    """As it is meant to be seen: turned as its EXIF says, transparency over white, in RGB.

    Raises:
      UserError: no picture of such a size or kind can be edited.
    """
    picture = ImageOps.exif_transpose(picture)
    width, height = picture.size
    if min(width, height) < LEAST or max(width, height) > MOST:
        raise UserError(
            f"a picture of {width}x{height} pixels: sides are from {LEAST} to {MOST:,}"
        )
    if max(width, height) > ASPECT * min(width, height):
        raise UserError(f"a picture of {width}x{height} pixels: it is too narrow to be edited")
    try:
        return images.rgb(picture)
    except ValueError as error:
        raise UserError(f"it cannot be edited: {error}") from error


def size_of_area(area: int, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height), multiples of STEP, near an area of pixels and in a size's proportions."""
    ratio = size[0] / size[1]
    width = math.sqrt(area * ratio)
    return tuple(max(1, round(side / STEP)) * STEP for side in (width, width / ratio))


def resized(picture: Image.Image, area: int) -> Image.Image:
    """In `size_of_area`."""
    return picture.resize(size_of_area(area, picture.size), Image.Resampling.LANCZOS)


def looked_at(
    picture: Image.Image, config: vision.Config, least: int, most: int
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture in whole tokens of the vision tower, between so many pixels."""
    unit, (width, height) = config.unit, picture.size
    sides = [round(side / unit) * unit for side in (height, width)]  # ties to even
    pixels = height * width
    if math.prod(sides) > most:
        by = math.sqrt(pixels / most)
        sides = [max(unit, math.floor(side / by / unit) * unit) for side in (height, width)]
    elif math.prod(sides) < least:
        by = math.sqrt(least / pixels)
        sides = [math.ceil(side * by / unit) * unit for side in (height, width)]
    return np.asarray(picture.resize(tuple(sides[::-1]), Image.Resampling.BICUBIC))


def pixels(picture: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 3"]:
    """As the vision tower takes them."""
    return (picture.astype(np.float32) / np.float32(255) - MEAN) / DEVIATION


def limits(processor: dict[str, Any]) -> tuple[int, int]:
    """The least and the most pixels that the vision tower is shown, of a published
    preprocessor_config.json.

    Raises:
      UserError: it does not say them.
    """
    size = processor.get("size") or {}
    found = tuple(
        size.get(new, processor.get(old))
        for new, old in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))
    )
    if not all(isinstance(one, int) and one > 0 for one in found):
        raise UserError(
            "processor/preprocessor_config.json does not say how many pixels are looked at "
            "(min_pixels, max_pixels): import the whole pipeline folder"
        )
    return found


def places(
    ids: Int[np.ndarray, "B L"], image_token: int, grids: Sequence[tuple[int, int]]
) -> Int[np.ndarray, "B L 3"]:
    """Frame, row and column of every token (Qwen2.5-VL's 3-D positions).

    A text's token stands one further along all three; a picture's tokens stand in its rows and
    columns from there, and what follows goes on outside its longer side. grids: rows and columns of
    each picture's tokens.
    """
    found = np.zeros((*ids.shape, 3), np.int32)
    blocks = [np.stack([np.zeros(h * w, int), *np.indices((h, w)).reshape(2, -1)], -1)
              for h, w in grids]
    for row, of in zip(ids, found, strict=True):
        start = at = number = 0
        while at < len(row):
            if row[at] == image_token and number < len(grids):
                block = blocks[number]
                of[at : at + len(block)] = start + block
                at, start = at + len(block), start + max(grids[number])
                number += 1
            else:
                of[at] = start
                at, start = at + 1, start + 1
    return found


@dataclasses.dataclass(frozen=True)
class Form:
    """How one of the published pipelines shows pictures, a `family.Editing`. looked: pixels of a
    picture that the text encoder sees; numbered: whether the prompt counts them; last: whether the
    last one decides the size of the result, and not the first."""

    looked: int
    most: int
    numbered: bool
    last: bool
    area: int = MEGAPIXEL

    def upright(self, picture: Image.Image) -> Image.Image:
        return upright(picture)

    def size(self, pictures: Sequence[Image.Image], area: int) -> tuple[int, int]:
        return size_of_area(area, self.decides(pictures).size)

    def decides(self, pictures: Sequence[Image.Image]) -> Image.Image:
        return pictures[-1 if self.last else 0]

    def encoded(self, picture: Image.Image, area: int) -> UInt8[np.ndarray, "H W 3"]:
        return np.asarray(resized(picture, area))

    def seen(
        self, config, processor: dict[str, Any], picture: Image.Image
    ) -> Float[np.ndarray, "H W 3"]:
        small = resized(picture, self.looked)
        return pixels(looked_at(small, config.vision, *limits(processor)))

    def tokenize(
        self, tokenizer, config, prompts: Sequence[str],
        seen: Sequence[Float[np.ndarray, "_ _ 3"]], tokens: int | None = None,
        negative: bool = False,
    ) -> tuple:
        """(ids, mask, places, pictures). The ids of a row are PREFIX and `tokens`, or else the
        least multiple of ROUNDED that holds the longest. Nothing is cut: the pictures would be.

        Raises:
          UserError: an instruction that is empty and not negative, or too long.
        """
        tokenizers.check(prompts, negative, "what to do with the picture")
        named = (f"Picture {i + 1}: " if self.numbered else "" for i in range(len(seen)))
        shown = "".join(name + PICTURE for name in named)
        grids = [tuple(side // config.vision.unit for side in one.shape[:2]) for one in seen]
        counts = [height * width for height, width in grids]
        [picture] = tokenizer("<|image_pad|>")["input_ids"][:1]
        rows = []
        for prompt in prompts:
            left, row = list(counts), []
            for token in tokenizer(TEMPLATE.format(shown + prompt))["input_ids"]:
                row += [token] * (left.pop(0) if token == picture and left else 1)
            rows.append(row)
        longest, most = max(map(len, rows)) - PREFIX, MAX_TOKENS + sum(counts)
        most = min(tokens or most, most)
        if longest > most:
            raise UserError(
                f"an instruction and its pictures make {longest} tokens: they may make {most}; "
                "shorten it"
            )
        length = tokens or -(-longest // ROUNDED) * ROUNDED
        ids, mask = tokenizers.padded(rows, PREFIX + length, tokenizer.pad_token_id)
        pictures = tuple(np.repeat(one[None], len(prompts), 0) for one in seen)
        return ids, mask, places(ids, config.image_token, grids), pictures

    def shown(
        self, config, ids: Int[np.ndarray, "L"], seen: Sequence[Float[np.ndarray, "_ _ 3"]]
    ) -> int:
        unit = config.vision.unit
        count = sum(one.shape[0] * one.shape[1] // unit**2 for one in seen)
        last = np.flatnonzero(ids == config.image_token)[count - 1]
        return int(last) + 2 - PREFIX  # the end of the picture comes after it


EDIT = Form(MEGAPIXEL, most=1, numbered=False, last=False)
PLUS = Form(384 * 384, most=3, numbered=True, last=True)

"""Pictures as PNG files with their settings, each written as soon as it exists."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image

from twinflow_jax import arguments, images
from twinflow_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Page:
    """One picture to be. label: begins its file's name. text: what its text chunks say."""

    label: str
    text: dict[str, str]

    @property
    def name(self) -> str:
        """Of its file; another one with other settings: no picture takes another's place."""
        told = json.dumps(self.text, sort_keys=True).encode()
        return f"{self.label}_{hashlib.sha256(told).hexdigest()[:8]}.png"


def settings(**told) -> dict[str, str]:
    """The text chunks that say what pictures were made with."""
    return {"Software": "twinflow_jax", "twinflow": json.dumps(told)}


def check(count: int, height: int, width: int, sheet: bool) -> None:
    """Refuses more pictures than a command draws, or than there are on a sheet that opens again.

    Raises:
      UserError: says how many there may be.
    """
    most = Image.MAX_IMAGE_PIXELS // (height * width) if sheet else arguments.MOST
    if count > most:
        where = f"on a sheet of {width}x{height} each" if sheet else "of one command"
        raise UserError(f"{count:,} pictures: at most {most:,} {where}, lower --count")


def missing(folder: epath.Path, pages: Sequence[Page]) -> list[int]:
    """The pages that are not there yet."""
    return [i for i, page in enumerate(pages) if not (folder / page.name).exists()]


def summary(folder: epath.Path, pages: Sequence[Page], drawn: Sequence[int]) -> str:
    """One line for the person who asked; drawn: the pages that were not there before."""
    found = f"{len(pages)} pictures in {folder}" if len(pages) > 1 else (
        f"picture in {folder / pages[0].name}"
    )
    before = len(pages) - len(drawn)
    return found + (f", {before} of them there before" if before else "")


def write(
    folder: epath.Path, pages: Iterable[Page], pictures: Iterable[Float[np.ndarray, "H W C"]]
) -> None:
    """Writes pictures in [-1, 1] while they come."""
    for page, picture in zip(pages, pictures, strict=True):
        pixels = Image.fromarray(images.to_uint8(picture))
        images.save(folder / page.name, pixels, page.text)

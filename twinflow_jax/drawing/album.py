"""Pictures as PNG files with their settings, each written as soon as it exists."""

import dataclasses
import json
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image

from twinflow_jax import images


@dataclasses.dataclass(frozen=True)
class Page:
    """One picture to be. name: of its file. text: what its text chunks say."""

    name: str
    text: dict[str, str]


def settings(**told) -> dict[str, str]:
    """The text chunks that say what pictures were made with."""
    return {"Software": "twinflow_jax", "twinflow": json.dumps(told)}


def missing(folder: epath.Path, pages: Sequence[Page]) -> list[int]:
    """The pages that are not there yet: no such file, or one that was made otherwise."""
    return [i for i, page in enumerate(pages) if _text(folder / page.name) != page.text]


def summary(folder: epath.Path, pages: Sequence[Page], drawn: Sequence[int]) -> str:
    """One line for the person who asked; drawn: the pages that were not there before."""
    found = f"{len(pages)} pictures in {folder}" if len(pages) > 1 else (
        f"picture in {folder / pages[0].name}"
    )
    before = len(pages) - len(drawn)
    return found + (f", {before} of them there before" if before else "")


def _text(file: epath.Path) -> dict[str, str] | None:
    try:
        with file.open("rb") as stream, Image.open(stream) as picture:
            return dict(picture.text)
    except (OSError, AttributeError):  # none, or something else
        return None


def write(
    folder: epath.Path, pages: Iterable[Page], pictures: Iterable[Float[np.ndarray, "H W C"]]
) -> None:
    """Writes pictures in [-1, 1] while they come."""
    for page, picture in zip(pages, pictures, strict=True):
        pixels = Image.fromarray(images.to_uint8(picture))
        images.save(folder / page.name, pixels, page.text)

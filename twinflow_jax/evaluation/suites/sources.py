"""The pictures that a suite's prompts are about."""

import concurrent.futures
import functools
import hashlib

from PIL import Image

from twinflow_jax.drawing import editing
from twinflow_jax.evaluation.suites.gallery import THREADS
from twinflow_jax.evaluation.suites.suite import Item, Prompts, Size
from twinflow_jax.models.family import Editing


def edit(form: Editing, prompts: Prompts, item: Item) -> editing.Edit:
    """What is to be drawn of an item.

    Raises:
      UserError: its picture cannot be read or edited; names it.
    """
    name = f"{item.source}, which {item.id} is about,"
    return editing.decoded(form, item.text, [(name, functools.partial(prompts.read, item))])


def picture(form: Editing, prompts: Prompts, item: Item) -> Image.Image:
    """As the network sees it; raises as `edit`."""
    [found] = edit(form, prompts, item).pictures
    return found


def seen(form: Editing, prompts: Prompts, area: int) -> tuple[list[Size], str]:
    """The size that each item's picture has after an edit, of about so many pixels, and a digest of
    what all of them are before.

    Raises:
      UserError: as `edit`.
    """

    def look(item: Item) -> tuple[Size, bytes]:
        before = picture(form, prompts, item)
        pixels = hashlib.sha256(before.tobytes())
        pixels.update(repr(before.size).encode())
        return form.size([before], area), pixels.digest()

    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(look, prompts.items))
    sizes, digests = zip(*found, strict=True)
    return list(sizes), hashlib.sha256(b"".join(digests)).hexdigest()

"""A suite's pictures through a pipeline, by any number of processes.

Items are drawn in units, which are the same whoever draws them: with the same batches, the same
program makes the same bytes, however many processes there are and however often they are stopped.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image

from twinflow_jax import drawing, files, images
from twinflow_jax.checkpoints import store
from twinflow_jax.drawing import (
    Embeddings,
    Pipeline,
    by_prompt,
    codec,
    denoising,
    editing,
    text,
)
from twinflow_jax.errors import TextCut
from twinflow_jax.evaluation.suites import sources
from twinflow_jax.evaluation.suites.gallery import Gallery, Progress
from twinflow_jax.evaluation.suites.suite import Item, Prompts, Size, Suite
from twinflow_jax.models.family import Prompts as Tokens

WRITERS = 4  # threads that compress pictures


@dataclasses.dataclass(frozen=True)
class Job:
    """What to draw. size: that all pictures get, None where each has its own of `sizes`, by item,
    of which those that are alike are drawn together. ways: how, by size. batch: pictures denoised
    at once. sources: digest of the pictures that the prompts are about."""

    pipeline: Pipeline
    suite: Suite
    prompts: Prompts
    size: Size | None
    sizes: Sequence[Size]
    ways: Mapping[Size, by_prompt.Way]
    seed: int
    batch: int
    tile: int
    sources: str | None = None

    def size_of(self, item: int) -> Size:
        """(width, height) of the pictures of the item of a number."""
        return self.size or self.sizes[item]

    @property
    def way(self) -> dict[str, Any]:
        """The sampler's settings that are alike for all sizes; with the `negative` prompt where one
        guides away from it."""
        first, *others = (way.settings for way in self.ways.values())
        return {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}

    @property
    def units(self) -> list[list[int]]:
        """Numbers of items that are drawn together: the fewest that fill whole batches."""
        each = math.lcm(self.batch, self.suite.samples) // self.suite.samples
        alike: dict[Size, list[int]] = {}
        for i, size in enumerate(self.sizes):
            alike.setdefault(size, []).append(i)
        return [of[i : i + each] for of in alike.values() for i in range(0, len(of), each)]

    def settings(self) -> dict[str, Any]:
        """All that the pictures depend on."""
        pipeline = self.pipeline
        return {
            "suite": self.suite.name, "prompts": self.prompts.digest, "sources": self.sources,
            "rewritten": self.prompts.rewritten, "step": pipeline.step,
            "weights": store.fingerprint(pipeline.arrays("transformer")),
            "text_encoder": pipeline.checkpoint.text_identity,
            "autoencoder": pipeline.checkpoint.identity("vae"),
            "size": self.size, "seed": self.seed, "dtype": pipeline.dtype, "batch": self.batch,
            "tile": self.tile, **self.way,
        }


def draw(job: Job, gallery: Gallery, about: dict[str, Any], together: bool = False) -> bool:
    """Draws this process's share of what is not there; whether this is process 0, which waits for
    the others. about: what the manifest says besides. together: all end together, as processes
    that JAX has joined must.

    Raises:
      UserError: the folder is of other pictures or in use.
    """
    items, suite = job.prompts.items, job.suite
    tokens, cut = (None, 0) if suite.edits else tokenized(job)
    with gallery.claim(job.settings(), about | {"cut": cut}):
        names = gallery.names()
        wanted = [set(suite.files(item)) for item in items]
        left = lambda unit: [i for i in unit if not wanted[i] <= names]
        mine = [unit for _, unit in gallery.mine(job.units)]
        todo = [unit for unit in mine if left(unit)]
        done = gallery.done_files()[gallery.process]
        done.unlink(missing_ok=True)
        (gallery.work / "through").mkdir(parents=True, exist_ok=True)
        each = suite.samples
        total, rest = each * len(items), each * sum(len(left(unit)) for unit in mine)
        progress = Progress(gallery, total, rest)
        unread = [unit for unit in todo if not gallery.embeddings_file(unit).exists()]
        null = None
        if suite.edits and unread:
            embed_edits(job, gallery, unread)
        elif unread:
            embed(job, gallery, unread, tokens)
        if (negative := job.way.get("negative")) is not None and todo and not suite.edits:
            null = text.embed(job.pipeline, [], negative=negative)
        with job.pipeline.kept() as pipeline, concurrent.futures.ThreadPoolExecutor(
            WRITERS
        ) as threads:
            drawer, written = dataclasses.replace(job, pipeline=pipeline), []
            for unit in todo:
                missing = left(unit)
                pictures = draw_unit(drawer, gallery, unit, null)
                for future in written:  # those of the unit before
                    future.result()
                written = [
                    threads.submit(write, drawer, gallery, items[i], pictures[unit.index(i)])
                    for i in missing
                ]
                progress.update(each * len(missing))
            for future in written:
                future.result()
        files.write(done, b"")
        if gallery.process and not together:
            return False
        if not set().union(*wanted) <= gallery.names():
            ended = lambda: gallery.process and not done.exists()
            gallery.wait(gallery.done_files(), "the pictures", ended)
        if gallery.process:
            return False
        gallery.work.rmtree()
        return True


def tokenized(job: Job) -> tuple[Tokens, int]:
    """All of the suite's prompts, as long as the longest: one program for all of them. And how
    many lose their end."""
    pipeline = job.pipeline
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tokens = pipeline.family.tokenize(
            text.tokenizers(pipeline), [item.text for item in job.prompts.items]
        )
    cut = sum(issubclass(warning.category, TextCut) for warning in told)
    if cut:
        warnings.warn(f"{cut:,} prompts are too long for the text encoder: their ends are cut",
                      stacklevel=2)
    return tokens, cut


def embed(job: Job, gallery: Gallery, units: list[list[int]], tokens: Tokens) -> None:
    """Encodes the prompts of units into files."""
    with text.encoder(job.pipeline, min(text.BATCH, len(job.units[0]))) as encode:
        for unit in units:
            rows = jax.tree.map(lambda a: a[unit], tokens)  # noqa: B023
            encode(rows).save(
                gallery.embeddings_file(unit), [job.prompts.items[i].text for i in unit]
            )


def embed_edits(job: Job, gallery: Gallery, units: list[list[int]]) -> None:
    """Encodes the instructions of units and their pictures into files; after them, where there is
    one, the negative prompt with each of the pictures."""
    items, form = job.prompts.items, job.pipeline.family.editing
    edits = (sources.edit(form, job.prompts, items[i]) for unit in units for i in unit)
    told = dataclasses.replace(job.pipeline, progress=True)  # it takes a while
    made = editing.conditions(told, edits, job.way.get("negative"))
    with contextlib.closing(made):
        for unit in units:
            conds, nulls = zip(*itertools.islice(made, len(unit)), strict=True)
            rows = [*conds, *(null for null in nulls if null)]
            texts = [items[i].text for i in unit] * (len(rows) // len(unit))
            Embeddings.join(rows).save(gallery.embeddings_file(unit), texts)


def draw_unit(
    job: Job, gallery: Gallery, unit: list[int], null: Embeddings | None
) -> list[list[Float[np.ndarray, "H W 3"]]]:
    """The pictures of each of a unit's items. The noise of item i's picture k is that of (seed,
    i * samples + k)."""
    pipeline, each, size = job.pipeline, job.suite.samples, job.size_of(unit[0])
    width = pipeline.config("transformer").text_width
    found = Embeddings.read(gallery.embeddings_file(unit), width)[1]
    if job.suite.edits:
        cond, empty = found[: len(unit)], [found[len(unit) :]] * (len(found.tokens) > len(unit))
    else:
        cond, *empty = drawing.same_length(found, *([null] if null else []))
    count = each * len(unit)
    rows = np.arange(-(-count // job.batch) * job.batch) % count  # the last batch wraps
    numbers = each * np.array(unit)[rows // each] + rows % each
    latents = np.concatenate(list(denoising.denoise(
        pipeline, job.ways[size].sampler, cond, rows // each, numbers,
        denoising.latent_shape(pipeline, size[::-1]), job.seed, job.batch, *empty,
    )))[:count]
    pictures = list(codec.decode(pipeline, latents, job.tile))
    return [pictures[i : i + each] for i in range(0, count, each)]


def write(
    job: Job, gallery: Gallery, item: Item, pictures: list[Float[np.ndarray, "H W 3"]]
) -> None:
    """An item's files, each whole or not at all; without texts, so that only pixels count."""
    suite, through = job.suite, gallery.work / "through"
    if item.beside:
        files.write(gallery.folder / item.beside[0], item.beside[1], through)
    if suite.shown:
        before = sources.picture(job.pipeline.family.editing, job.prompts, item)
        images.save(gallery.folder / suite.shown.format(id=item.id), before, through=through)
    pixels = [images.to_uint8(picture) for picture in pictures]
    if suite.grid:
        pixels = [grid(pixels)]
    for place, one in zip(suite.pictures(item), pixels, strict=True):
        images.save(gallery.folder / place, Image.fromarray(one), through=through)


def grid(pixels: list[UInt8[np.ndarray, "H W 3"]]) -> UInt8[np.ndarray, "HH WW 3"]:
    """Four pictures, row by row, with nothing between."""
    a, b, c, d = pixels
    return np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)])


def map_file(
    suite: Suite, gallery: Gallery, items: tuple[Item, ...], folder: epath.Path
) -> None:
    """Writes where each prompt's picture is, for a scorer that asks for it. folder: where the
    scorer finds them."""
    places = {i.prompt: str(folder / suite.pictures(i)[0]) for i in items}
    files.write(gallery.beside(".json"), json.dumps(places, indent=1).encode())

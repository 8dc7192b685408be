"""A suite's pictures through a pipeline, by any number of processes.

Items are drawn in units, which are the same whoever draws them: with the same batches, the same
program makes the same bytes, however many processes there are and however often they are stopped.
"""

import concurrent.futures
import dataclasses
import json
import math
import warnings
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from twinflow_jax import drawing, files, images
from twinflow_jax.checkpoints import store
from twinflow_jax.drawing import Embeddings, Pipeline, Sampler, codec, denoising, text
from twinflow_jax.errors import TextCut
from twinflow_jax.evaluation.suites.gallery import Gallery, Progress
from twinflow_jax.evaluation.suites.suite import Item, Prompts, Suite
from twinflow_jax.models.family import Prompts as Tokens

WRITERS = 4  # threads that compress pictures


@dataclasses.dataclass(frozen=True)
class Job:
    """What to draw. shape: of the latents. batch: pictures denoised at once. way: the sampler's
    settings, for the manifest; with the `negative` prompt where one guides away from it."""

    pipeline: Pipeline
    suite: Suite
    prompts: Prompts
    sampler: Sampler
    shape: tuple[int, int, int]
    seed: int
    batch: int
    tile: int
    way: dict[str, Any]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of a picture."""
        scale = self.pipeline.config("vae").downscale
        return self.shape[1] * scale, self.shape[0] * scale

    @property
    def units(self) -> list[range]:
        """Items that are drawn together: the fewest that fill whole batches."""
        each = math.lcm(self.batch, self.suite.samples) // self.suite.samples
        count = len(self.prompts.items)
        return [range(i, min(i + each, count)) for i in range(0, count, each)]

    def settings(self) -> dict[str, Any]:
        """All that the pictures depend on."""
        pipeline = self.pipeline
        return {
            "suite": self.suite.name, "prompts": self.prompts.digest,
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
    tokens, cut = tokenized(job)
    with gallery.claim(job.settings(), about | {"cut": cut}):
        names = gallery.names()
        wanted = [set(suite.files(item, job.size)) for item in items]
        left = lambda unit: [i for i in unit if not wanted[i] <= names]
        mine = [unit for _, unit in gallery.mine(job.units)]
        todo = [unit for unit in mine if left(unit)]
        done = gallery.done_files()[gallery.process]
        done.unlink(missing_ok=True)
        (gallery.work / "through").mkdir(parents=True, exist_ok=True)
        each = suite.samples
        total, rest = each * len(items), each * sum(len(left(unit)) for unit in mine)
        progress = Progress(gallery, total, rest)
        embed(job, gallery, todo, tokens)
        null = None
        if (negative := job.way.get("negative")) is not None and todo:
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
                    threads.submit(write, suite, gallery, items[i], pictures[i - unit.start])
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


def embed(job: Job, gallery: Gallery, units: list[range], tokens: Tokens) -> None:
    """Encodes the prompts of units into files, where that was not done yet."""
    units = [unit for unit in units if not gallery.embeddings_file(unit).exists()]
    if not units:
        return
    with text.encoder(job.pipeline, min(text.BATCH, len(job.units[0]))) as encode:
        for unit in units:
            rows = jax.tree.map(lambda a: a[unit.start : unit.stop], tokens)  # noqa: B023
            encode(rows).save(
                gallery.embeddings_file(unit), [job.prompts.items[i].text for i in unit]
            )


def draw_unit(
    job: Job, gallery: Gallery, unit: range, null: Embeddings | None
) -> list[list[Float[np.ndarray, "H W 3"]]]:
    """The pictures of each of a unit's items. The noise of item i's picture k is that of (seed,
    i * samples + k)."""
    pipeline, each = job.pipeline, job.suite.samples
    width = pipeline.config("transformer").text_width
    cond = Embeddings.read(gallery.embeddings_file(unit), width)[1]
    cond, *empty = drawing.same_length(cond, *([null] if null else []))
    count = each * len(unit)
    rows = np.arange(-(-count // job.batch) * job.batch) % count  # the last batch wraps
    latents = np.concatenate(list(denoising.denoise(
        pipeline, job.sampler, cond, rows // each, each * unit.start + rows, job.shape, job.seed,
        job.batch, *empty,
    )))[:count]
    pictures = list(codec.decode(pipeline, latents, job.tile))
    return [pictures[i : i + each] for i in range(0, count, each)]


def write(
    suite: Suite, gallery: Gallery, item: Item, pictures: list[Float[np.ndarray, "H W 3"]]
) -> None:
    """An item's files, each whole or not at all; without texts, so that only pixels count."""
    through = gallery.work / "through"
    if item.beside:
        files.write(gallery.folder / item.beside[0], item.beside[1], through)
    pixels = [images.to_uint8(picture) for picture in pictures]
    if suite.grid:
        pixels = [grid(pixels)]
    for place, one in zip(suite.pictures(item), pixels, strict=True):
        images.save(gallery.folder / place, Image.fromarray(one), through=through)


def grid(pixels: list[UInt8[np.ndarray, "H W 3"]]) -> UInt8[np.ndarray, "HH WW 3"]:
    """Four pictures, row by row, with nothing between."""
    a, b, c, d = pixels
    return np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)])


def map_file(suite: Suite, gallery: Gallery, items: tuple[Item, ...]) -> None:
    """Writes where each prompt's picture is, for a scorer that asks for it."""
    places = {i.prompt: str(gallery.folder / suite.pictures(i)[0]) for i in items}
    files.write(gallery.beside(".json"), json.dumps(places, indent=1).encode())

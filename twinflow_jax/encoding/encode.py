"""Pictures and captions through a pipeline's encoders to records, by any number of processes.

What a process does is a function of the source and the settings alone, file by file: the records
are the same however many processes made them and however often those were stopped.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from twinflow_jax import files
from twinflow_jax.checkpoints import store
from twinflow_jax.data import records
from twinflow_jax.data.records import Edit, Example, Manifest
from twinflow_jax.drawing import Pipeline, codec, editing, text
from twinflow_jax.encoding import index, sizes
from twinflow_jax.encoding.captions import Captions
from twinflow_jax.encoding.drawn import Drawing, drawn, schedule_of
from twinflow_jax.encoding.index import Entry, Key, Shard, Skipped
from twinflow_jax.encoding.sources import THREADS, UNREADABLE, Source, cut
from twinflow_jax.encoding.workspace import ShardReport, Workspace, nothing_in
from twinflow_jax.errors import UserError, reason

TOO_LONG = "too long"
BLOCK = 64  # items whose pictures and embeddings are in memory at once


def manifest_of(pipeline: Pipeline, pictures: bool, pairs: bool = False) -> Manifest:
    """What a pipeline's records are made with. pictures: False for prompts alone. pairs: whether
    the noise that pictures were drawn from is kept."""
    checkpoint, vae = pipeline.checkpoint, pipeline.config("vae")
    return Manifest(
        checkpoint.family, checkpoint.text_identity, checkpoint.text_width,
        checkpoint.identity("vae") if pictures else "",
        vae.latent_channels if pictures else 0, vae.downscale,
        pipeline.family.editing is not None, pairs,
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """What to encode. sizes: that pictures go to, none for prompts. min_side: pixels that a
    picture has at least. text_tokens: that captions are padded or cut to, None for the family's
    own. batch: pictures encoded at once, of 512x512; fewer of larger ones. drawing: how pictures
    are drawn, where the source has prompts and records are to have pictures; batch then is of
    those drawn at once, None for the least that uses all devices."""

    pipeline: Pipeline
    source: Source
    sizes: tuple[sizes.Size, ...]
    min_side: int
    shard_size: int
    text_tokens: int | None
    batch: int | None
    drawing: Drawing | None = None

    @property
    def manifest(self) -> Manifest:
        """What the records are made with."""
        pairs = self.drawing is not None and self.drawing.pairs
        return manifest_of(self.pipeline, bool(self.sizes), pairs)

    def settings(self) -> dict[str, Any]:
        """All that the records depend on."""
        by = {"drawing": None} if not self.drawing else {
            "drawing": self.drawing.told(),
            "transformer": self.pipeline.checkpoint.identity("transformer"),
            "schedule": hashlib.sha256(repr(schedule_of(self)).encode()).hexdigest()[:12],
        }
        return {
            "source": self.source.name, "contents": self.source.fingerprint(),
            "sizes": [sizes.name(size) for size in self.sizes], "min_side": self.min_side,
            "shard_size": self.shard_size, "text_tokens": self.text_tokens, "batch": self.batch,
            "dtype": self.pipeline.dtype, **by,
            **self.manifest.told(),
        }


def encode(job: Job, space: Workspace) -> dict[str, Any] | None:
    """Does this process's share; process 0 also what is done once, and returns the report.

    None on other processes, and where everything was done before.
    Raises:
      UserError: the folder is of other records or in use, the source changed, or nothing can be
        used.
    """
    settings, manifest = job.settings(), job.manifest
    with space.claim(settings) as finished:
        if finished:
            return None
        chunks = job.source.chunks
        listings = [index.chunk_file(space.work, number) for number in range(len(chunks))]
        todo = [n for n, _ in space.mine(chunks) if not listings[n].exists()]
        for number in tqdm(todo, unit="part", desc="listing", disable=not todo):
            index.write_chunk(space.work, job.source, number, job.min_side)
        if not space.wait(listings, "the listing", lambda: space.finished):
            return None
        plan = index.plan(space.work, len(chunks), job.sizes, job.shard_size)
        if not plan.shards:
            raise nothing_in(plan.skipped)
        mine = [shard for _, shard in space.mine(plan.shards)]
        left = [shard for shard in mine if not space.report_file(shard).exists()]
        if left:
            each = job.drawing.count if job.drawing else 1
            total, rest = (each * sum(len(shard.keys) for shard in of) for of in (mine, left))
            maker = drawn(job) if job.drawing else encoders(job)
            with maker as examples, tqdm(
                total=total, initial=total - rest, unit="image" if job.sizes else "prompt",
                desc="encoding",
            ) as bar:
                for shard in left:
                    write(space, shard, manifest, examples, bar)
        if space.process:
            return None
        reports = [space.report_file(shard) for shard in plan.shards]
        space.wait(reports, "the records", lambda: False)
        if not manifest.edits:  # each of those has its own
            null = text.null(job.pipeline)
            null.save(space.folder / records.NULL, [job.pipeline.family.null_prompt])
        return space.close(plan, manifest, settings)


def write(space: Workspace, shard: Shard, manifest: Manifest, examples: Callable, bar) -> None:
    """A file of records, then its report."""
    file, report = space.shard_file(shard), ShardReport()
    for entry in space.folder.iterdir():  # no glob: the folder's own name may hold a pattern
        if entry.name.startswith(f".{file.name}."):  # of a process that was killed
            entry.unlink()

    def counted() -> Iterator[Example]:
        for example in examples(space, shard, report):
            report.records += 1
            bar.update()
            yield example

    report.bytes = records.write_shard(file, counted(), manifest)
    bar.update(len(report.skipped))
    files.write(space.report_file(shard), report.to_json().encode())


@contextlib.contextmanager
def encoders(job: Job):
    """`(space, shard, report) -> the shard's records`; the encoders stay loaded meanwhile."""
    pipeline = job.pipeline
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(THREADS))
        embed = stack.enter_context(text.encoder(pipeline, text.BATCH))
        encode_images = stack.enter_context(codec.encoder(pipeline)) if job.sizes else None
        captions = Captions(pipeline, embed, job.text_tokens)
        instructions = editing.Instructions(pipeline, embed)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"PIL\.")  # said when the pictures were listed

        def examples(space: Workspace, shard: Shard, report: ShardReport) -> Iterator[Example]:
            blocks = cut(shard.keys, BLOCK)
            one = functools.partial(load_one, job, space, shard)
            load = lambda keys: list(threads.map(one, keys))
            for block in store.ahead(map(load, blocks)):
                report.skipped |= {key: found for key, _, found in block if type(found) is Skipped}
                kept = [one for one in block if type(one[2]) is not Skipped]
                if shard.sources:
                    told = instructions([(entry.captions, x[1:]) for _, entry, x in kept])
                    report.skipped |= {
                        key: Skipped(entry.id, TOO_LONG, str(one))
                        for (key, entry, _), one in zip(kept, told, strict=True)
                        if isinstance(one, UserError)
                    }
                    kept = [one for one in kept if one[0] not in report.skipped]
                    told = [one for one in told if not isinstance(one, UserError)]
                    tokens = [one.tokens for one in told]
                else:
                    tokens, told = captions([entry.captions for _, entry, _ in kept], report), ()
                latents = [
                    latents_of(encode_images, [x[k] for *_, x in kept], batch_of(job.batch, size))
                    for k, size in enumerate(shard.sizes)
                ]
                for i, (_, entry, _) in enumerate(kept):
                    sample, *references = (of[i] for of in latents) if latents else (None,)
                    edit = Edit(told[i].shown, told[i].null, tuple(references)) if told else None
                    yield Example(entry.id, entry.captions, tokens[i], sample, entry.size, edit)

        yield examples


def load_one(
    job: Job, space: Workspace, shard: Shard, key: Key
) -> tuple[Key, Entry, list[UInt8[np.ndarray, "_ _ 3"]] | Skipped]:
    """An item of a shard with its pictures, or why those cannot be used.

    Raises:
      UserError: a picture's file is not the one that was listed.
    """
    entry, pixels = index.read_chunk(space.work, key[0])[key[1]], []
    for size, picture in zip(shard.sizes, entry.pictures, strict=False):  # prompts have none
        try:
            data = job.source.read(picture.place)
        except OSError as error:
            raise UserError(
                f"{entry.id} could be read when it was listed, and now not "
                f"({error.strerror or error}): the same command goes on when it is back"
            ) from error
        if hashlib.sha256(data).hexdigest() != picture.image:
            raise UserError(
                f"{entry.id} has changed since it was listed: put it back, or choose another folder"
            )
        try:
            like = entry.size if sizes.alike(picture.size, entry.size) else None
            pixels.append(sizes.decode(data, size, like))
        except Exception as error:  # Pillow raises many kinds
            return key, entry, Skipped(entry.id, UNREADABLE, reason(error))
    return key, entry, pixels


def batch_of(batch: int, size: sizes.Size) -> int:
    """Pictures of a size at once, where `batch` of 512x512 are: no more pixels, at least one."""
    return max(min(batch, batch * 512 * 512 // (size[0] * size[1])), 1)


def latents_of(
    encode: Callable, pixels: Sequence[UInt8[np.ndarray, "H W 3"]], batch: int
) -> list[Float[np.ndarray, "h w c"]]:
    """What pictures of one size are encoded to, always `batch` at once."""
    parts = [np.stack(part).astype(np.float32) / 127.5 - 1 for part in cut(pixels, batch)]
    return [latent for part in parts for latent in encode(part, batch)]

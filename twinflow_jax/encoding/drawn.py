"""Pictures drawn by a base model from prompts, as training records: nothing is decoded."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from twinflow_jax import drawing, sampling
from twinflow_jax.data.records import Example
from twinflow_jax.drawing import Embeddings, Pipeline, denoising, text
from twinflow_jax.encoding import index
from twinflow_jax.encoding.captions import Captions
from twinflow_jax.encoding.index import Shard


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How the base model draws. count: pictures of each prompt; seed: of their noise; pairs:
    whether that is kept beside them."""

    steps: int
    guidance: float
    count: int
    seed: int
    pairs: bool = False

    def told(self) -> dict[str, int | float | bool]:
        """The fields, as they were before there were pairs where these are none."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "pairs" or v}


def shape_of(job) -> tuple[int, int, int]:
    """Of the latents of a job's pictures."""
    width, height = job.sizes[0]
    return denoising.latent_shape(job.pipeline, (height, width))


def schedule_of(job) -> sampling.Schedule:
    """The base model's own, of a job's pictures."""
    return denoising.schedule(job.pipeline, job.drawing.steps, shape_of(job))


@contextlib.contextmanager
def drawn(job):
    """`(space, shard, report) -> the shard's records`, drawn.

    Text encoder and transformer are loaded one after the other, for each file of records.
    """
    pipeline: Pipeline = job.pipeline
    how, shape = job.drawing, shape_of(job)
    sampler = denoising.base(pipeline, schedule_of(job), how.guidance)
    family = pipeline.family
    guided = how.guidance != family.no_guidance
    null = text.embed(pipeline, [], negative=family.negative_prompt) if guided else None

    def examples(space, shard: Shard, report) -> Iterator[Example]:
        entries = [index.read_chunk(space.work, chunk)[row] for chunk, row in shard.keys]
        wanted = [
            (entry, entry.captions[k % len(entry.captions)], k)
            for entry in entries for k in range(how.count)
        ]
        with text.encoder(pipeline, text.BATCH) as embed:
            captions = Captions(pipeline, embed, job.text_tokens)
            embedded = captions([[caption] for _, caption, _ in wanted], report)
        tokens = [of_one[0] for of_one in embedded]
        numbers = np.arange(shard.first * how.count, (shard.first + len(entries)) * how.count)
        parts = [padded(tokens)] + ([null] if null else [])
        cond, *empty = drawing.same_length(*parts)
        latents = np.concatenate(list(denoising.denoise(
            pipeline, sampler, cond, np.arange(len(wanted)), numbers, shape, how.seed, job.batch,
            *empty,
        )))
        noise = denoising.noise_of(numbers, shape, how.seed) if how.pairs else [None] * len(wanted)
        rows = zip(wanted, tokens, latents, noise, strict=True)
        for (entry, caption, k), of_one, sample, start in rows:
            name = f"{entry.id}#{k}"
            yield Example(name, (caption,), (of_one,), sample, job.sizes[0], noise=start)

    yield examples


def padded(tokens: Sequence[Float[np.ndarray, "_ D"]]) -> Embeddings:
    """Embeddings of prompts from their valid tokens."""
    return Embeddings.join([Embeddings(t[None], np.ones((1, len(t)), bool)) for t in tokens])

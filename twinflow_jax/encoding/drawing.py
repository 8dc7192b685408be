"""Pictures drawn by a base model from prompts, as training records: nothing is decoded."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from twinflow_jax import text_to_image
from twinflow_jax.data.records import Example
from twinflow_jax.encoding import index
from twinflow_jax.encoding.captions import Captions
from twinflow_jax.encoding.index import Shard
from twinflow_jax.text_to_image import Embeddings, Pipeline


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How the base model draws. count: pictures of each prompt; seed: of their noise."""

    steps: int
    guidance: float
    count: int
    seed: int


@contextlib.contextmanager
def drawing(job, how: Drawing):
    """`(space, shard, tally) -> the shard's records`, drawn.

    Text encoder and transformer are loaded one after the other, for each file of records.
    """
    pipeline: Pipeline = job.pipeline
    width, height = job.sizes[0]
    shape = pipeline.latent_shape((height, width))
    draw = pipeline.base(pipeline.schedule(how.steps, shape), how.guidance)
    negative = pipeline.family.negative_prompt
    null = pipeline.embed([], negative=negative) if how.guidance != 1 else None

    def examples(space, shard: Shard, tally) -> Iterator[Example]:
        entries = [index.read_chunk(space.work, chunk)[row] for chunk, row in shard.keys]
        wanted = [
            (entry, entry.captions[k % len(entry.captions)], k)
            for entry in entries for k in range(how.count)
        ]
        with pipeline.text_encoder(text_to_image.TEXT_BATCH) as embed:
            captions = Captions(pipeline, embed, job.text_tokens)
            tokens = [of_one[0] for of_one in captions([[text] for _, text, _ in wanted], tally)]
        numbers = np.arange(shard.first * how.count, (shard.first + len(entries)) * how.count)
        parts = [padded(tokens)] + ([null] if null else [])
        cond, *empty = text_to_image.same_length(*parts)
        latents = pipeline.denoise(
            draw, cond, np.arange(len(wanted)), numbers, shape, how.seed, job.batch, *empty
        )
        for (entry, text, k), of_one, sample in zip(wanted, tokens, latents, strict=True):
            yield Example(f"{entry.id}#{k}", (text,), (of_one,), sample, job.sizes[0])

    yield examples


def padded(tokens: Sequence[Float[np.ndarray, "_ D"]]) -> Embeddings:
    """Embeddings of prompts from their valid tokens."""
    return Embeddings.join([Embeddings(t[None], np.ones((1, len(t)), bool)) for t in tokens])

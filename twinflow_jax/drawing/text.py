"""Prompts through a pipeline's tokenizers and text encoders."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from twinflow_jax import buckets
from twinflow_jax.drawing.conditions import Embeddings
from twinflow_jax.drawing.pipeline import Pipeline
from twinflow_jax.models.family import Prompts
from twinflow_jax.parallel import hosts

BATCH = 8  # prompts encoded at once
STAGE = "text encoding"


def embed(
    pipeline: Pipeline, prompts: Sequence[str], tokens: int | None = None,
    negative: str | None = None,
) -> Embeddings:
    """Prompts through the tokenizers and the text encoders.

    tokens: that every prompt is padded or cut to (default: the least of the family's buckets
    that holds the longest). negative: one more, the last row, which may be blank.
    Raises:
      UserError: no tokenizer, or an empty prompt.
    """
    found, tokenize = tokenizers(pipeline), pipeline.family.tokenize
    groups = [tokenize(found, prompts, tokens)] if prompts else []
    if negative is not None:  # apart: its template, and so its length, may be another
        groups.append(tokenize(found, [negative], tokens, negative=True))
    with encoder(pipeline) as encode:
        return Embeddings.join([encode(group) for group in groups])


def tokenizers(pipeline: Pipeline) -> dict[str, Any]:
    """By text encoder. Raises UserError where the checkpoint lacks one."""
    found = {}
    for name, network in pipeline.family.encoders.items():
        with local_copy(pipeline.checkpoint.tokenizer(name)) as folder:
            found[name] = network.load_tokenizer(folder)
    return found


@contextlib.contextmanager
def encoder(
    pipeline: Pipeline, batch: int | None = None
) -> Iterator[Callable[[Prompts], Embeddings]]:
    """What embeds any number of rows, for as long as the family's text encoders stay loaded.

    batch: rows at once, always (default: up to BATCH).
    """
    with contextlib.ExitStack() as stack:
        configs, params = {}, {}
        for name in pipeline.family.encoders:
            configs[name], params[name] = stack.enter_context(pipeline.loaded(name, STAGE))
        function = functools.partial(pipeline.family.embed, configs)

        def encode(prompts: Prompts) -> Embeddings:
            count = len(next(iter(prompts.values()))[0])
            size, done = batch or min(BATCH, count), []
            for start in range(0, count, size):
                rows = np.arange(start, start + size) % count  # the last batch wraps
                part = jax.tree.map(lambda a: a[rows], prompts)  # noqa: B023
                states, valid = pipeline.run(STAGE, None, function, params, part)
                states = np.asarray(states.astype(jnp.float32))
                done.append(Embeddings(states, np.asarray(valid)))
            return Embeddings.join(done)[:count]

        yield encode


def null(pipeline: Pipeline) -> Embeddings:
    """The prompt that stands for none in training: encoded once, then kept beside the rest."""
    file = pipeline.checkpoint.folder / f"null_prompt_{pipeline.dtype}.safetensors"
    if file.exists():
        return Embeddings.read(file, pipeline.checkpoint.text_width)[1]
    prompt = pipeline.family.null_prompt
    embeddings = embed(pipeline, [], negative=prompt)
    if hosts.leads():
        with contextlib.suppress(OSError):  # a checkpoint that only others may write
            embeddings.save(file, [prompt])
    return embeddings


@contextlib.contextmanager
def local_copy(folder: epath.Path):
    """A folder as a local path: itself, or a copy of one on object storage."""
    if not buckets.is_remote(folder):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in folder.iterdir() if folder.exists() else ():
            if file.is_file():
                file.copy(epath.Path(copy) / file.name)
        yield copy

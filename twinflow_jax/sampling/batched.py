"""Many samples, in batches of one compiled shape."""

import collections
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Float, Int, UInt
from tqdm import tqdm

from twinflow_jax import seeds
from twinflow_jax.arrays import Numbers
from twinflow_jax.sampling.any_step import sample
from twinflow_jax.sampling.grids import Grid

BATCH = 256


def batches(
    draw: Callable, keys: jax.Array, shape: tuple[int, ...], size: int
) -> Iterator[Float[np.ndarray, "B ..."]]:
    """Samples, one for each of `keys`, `size` at once.

    draw: `(rows, noise, keys) -> samples`; rows: the numbers of a batch's samples, always `size`
    of them (the last batch wraps); keys: of each sample's fresh noise.
    """
    count = len(keys)
    for start in range(0, count, size):
        rows = np.arange(start, start + size) % count
        noise, fresh = started(keys[rows], shape)
        yield np.asarray(draw(rows, noise, fresh))[: count - start]


def started(
    keys: jax.Array, shape: tuple[int, ...]
) -> tuple[Float[jax.Array, "B ..."], jax.Array]:
    """What the samples of these keys start from, and the keys of their fresh noise."""
    pairs = jax.vmap(jax.random.split)(keys)
    return jax.vmap(lambda k: jax.random.normal(k, shape))(pairs[:, 0]), pairs[:, 1]


def generate(
    model, params, labels: Numbers, grid: Grid, seed: int, progress: bool = True
) -> Float[np.ndarray, "N ..."]:
    """Samples for labels, clamped to [-1, 1]; model: has apply, cond and sample_shape.

    The k-th sample of a class starts from noise of (seed, class, k).
    """
    labels = np.asarray(labels, np.int32)
    parts = by_class(model, params, labels, counted(labels), grid, seed)
    total = -(-len(labels) // min(BATCH, len(labels)))
    return np.concatenate(list(tqdm(parts, total=total, unit="batch", disable=not progress)))


def counted(labels: Int[np.ndarray, "N"]) -> UInt[np.ndarray, "N"]:
    """Which sample of its class each one is, from 0."""
    seen = collections.defaultdict(itertools.count)
    return np.array([next(seen[label]) for label in labels.tolist()], np.uint32)


def keys_of(
    labels: Int[np.ndarray, "N"], places: UInt[np.ndarray, "N"], seed: int
) -> jax.Array:
    """The key of each sample, of (seed, class, place)."""
    key = seeds.key(seed)
    return jax.vmap(lambda c, k: jax.random.fold_in(jax.random.fold_in(key, c), k))(labels, places)


def by_class(
    model, params, labels: Int[np.ndarray, "N"], places: UInt[np.ndarray, "N"], grid: Grid,
    seed: int,
) -> Iterator[Float[np.ndarray, "B ..."]]:
    """The samples of `generate` batch by batch; places: which of its class each one is."""
    keys = keys_of(labels, places, seed)

    def draw(rows, noise, keys):
        return sample(model.apply, params, noise, model.cond(labels[rows]), grid, keys)

    for part in batches(draw, keys, model.sample_shape, min(BATCH, len(labels))):
        yield np.clip(part, -1, 1)

"""Many samples of a class-conditional model, in batches of one compiled shape."""

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from twinflow_jax.arrays import Numbers
from twinflow_jax.sampling.any_step import sample
from twinflow_jax.sampling.grids import Grid

BATCH = 256


def generate(
    model, params, labels: Numbers, grid: Grid, seed: int, progress: bool = True
) -> Float[np.ndarray, "N ..."]:
    """Samples for labels, clamped to [-1, 1]; model: has apply, cond and sample_shape.

    The k-th sample of a class starts from noise of (seed, class, k).
    """
    labels = np.asarray(labels, np.int32)
    seen = np.zeros(labels.max(initial=0) + 1, np.int64)
    places = np.zeros(len(labels), np.uint32)
    for i, label in enumerate(labels):
        places[i], seen[label] = seen[label], seen[label] + 1
    key = jax.random.key(seed)
    keys = jax.vmap(lambda c, k: jax.random.fold_in(jax.random.fold_in(key, c), k))(labels, places)
    shape = model.sample_shape
    size = min(BATCH, len(labels))
    parts = []
    for start in tqdm(range(0, len(labels), size), unit="batch", disable=not progress):
        rows = np.arange(start, start + size) % len(labels)  # the last batch wraps: one shape
        pairs = jax.vmap(jax.random.split)(keys[rows])
        noise = jax.vmap(lambda k: jax.random.normal(k, shape))(pairs[:, 0])
        x = sample(model.apply, params, noise, model.cond(labels[rows]), grid, pairs[:, 1])
        parts.append(np.asarray(x))
    return np.clip(np.concatenate(parts)[: len(labels)], -1, 1)

"""Batches of an in-memory split, any of them computable from its step number alone."""

import functools
from collections.abc import Iterator

import grain
import numpy as np

from twinflow_jax.data.sources import Split
from twinflow_jax.errors import UserError


def batches(
    split: Split, batch_size: int, seed: int, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Endless `{"x": (B, H, W, C), "label": (B,)}` from step `start` on.

    Each epoch is a new permutation of the split, drawn from (seed, epoch); what does not fill
    a batch at its end is left out of that epoch. Batches are made a few steps ahead, in a
    thread.

    Raises:
      UserError: the split has fewer rows than a batch.
    """
    per_epoch = len(split) // batch_size
    if per_epoch == 0:
        raise UserError(
            f"data has {len(split)} training images, too few for a batch of {batch_size}"
        )

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(split))

    def batch(step: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(int(step), per_epoch)
        rows = permutation(epoch)[place * batch_size : (place + 1) * batch_size]
        return {"x": split.x[rows], "label": split.label[rows]}

    steps = grain.MapDataset.range(start, np.iinfo(np.int32).max).map(batch)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

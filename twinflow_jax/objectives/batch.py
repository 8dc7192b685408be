"""What an objective trains on."""

from typing import Any, NamedTuple

from jaxtyping import Array, Int

from twinflow_jax.arrays import Samples


class Batch(NamedTuple):
    """One batch, rows in the order of the objective's roles.

    x: data or latents (B, ...), channels last. cond, null_cond: pytrees of arrays with leading
    B, the condition and what stands for its absence in classifier-free guidance. done: optimizer
    steps of this objective so far, the same for every row, where its Config counts them. noise:
    what x was drawn from, where the Config learns from pairs.
    """

    x: Samples
    cond: Any
    null_cond: Any
    done: Int[Array, "B"] | None = None
    noise: Samples | None = None

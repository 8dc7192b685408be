"""Moving averages of the weights: the teacher's, and the one that is sampled."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Average(NamedTuple):
    """params: the average so far. decay: what the next update uses; it warms up from 0."""

    params: Any
    decay: jax.Array


def start(params) -> Average:
    """An average that its first update replaces by the weights then (decay 0)."""
    return Average(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.float32))


def update(average: Average, params, decay: float) -> Average:
    """One update at the current decay, which then moves towards `decay`.

    Warm-up as released: d <- d + (1 - d) (decay - d) / 2, so 0, .495, .62, .69 ... for .99.
    """
    d = average.decay
    averaged = optax.incremental_update(params, average.params, 1.0 - d)
    return Average(averaged, d + (1.0 - d) * (decay - d) * 0.5)

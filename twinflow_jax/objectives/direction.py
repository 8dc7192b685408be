"""Where to move samples so that their distribution comes closer to the data's.

A sample x is mixed with noise z to x' = tau z + (1 - tau) x, where two velocities are known: the
data's, v_real, and that of such samples themselves, v_fake. They say where each distribution has
its samples: x_real = x' - tau v_real and x_fake = x' - tau v_fake. The move x_real - x_fake =
tau (v_fake - v_real) is, up to a factor, the gradient of the divergence of the two distributions.
"""

import jax
import jax.numpy as jnp

from twinflow_jax.arrays import Times, Velocities
from twinflow_jax.objectives import path

LEAST = 1e-5  # mean distance that a move is divided by (SiD's)


def direction(
    rule: str, v_real: Velocities, v_fake: Velocities, v: Velocities | None = None,
    tau: Times | None = None,
) -> Velocities:
    """The move of each sample. v: z - x, of the sample's own line; tau: where both were taken.

    "twin": v_fake - v_real, of no tau (TwinFlow, released `dist_match`).
    "vsd": x_real - x_fake (arXiv 2305.16213, its weight w = 1 on samples).
    "dmd", "sid": the same over the mean of abs(x - x_real) of the row, without gradient
    (arXiv 2311.18828, its weighting factor; arXiv 2404.04057, its omega).
    """
    if rule == "twin":
        return v_fake - v_real
    move = path.expand(tau, v_real) * (v_fake - v_real)
    if rule == "vsd":
        return move
    distance = jnp.abs(path.expand(tau, v_real) * (v_real - v))  # x - x_real
    mean = jnp.mean(distance, axis=tuple(range(1, distance.ndim)), keepdims=True)
    return move / jax.lax.stop_gradient(jnp.maximum(mean, LEAST))

"""The linear path between data and noise, and what a velocity says about its two ends.

`x_t = t z + (1 - t) x` with `t = 1` pure noise and `t = 0` data, so `dx_t/dt = z - x`
("transport_type: Linear" in the released configs). Times are
signed: a negative time lies on the fake (twin) trajectory, at distance |t| from its data end.
"""

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from twinflow_jax.arrays import Samples, Times, Velocities


def expand(t: Shaped[Array, "B"], x: Shaped[Array, "B *shape"]) -> Shaped[Array, "B ..."]:
    """Reshapes numbers of rows (B,) so that they broadcast against x (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def interpolate(x: Samples, z: Samples, t: Times) -> Samples:
    """The point `|t| z + (1 - |t|) x` of the path from data x to noise z."""
    t = expand(jnp.abs(t), x)
    return t * z + (1 - t) * x


def velocity(x: Samples, z: Samples) -> Velocities:
    """The path's constant velocity `z - x`."""
    return z - x


def predict(x_t: Samples, t: Times, v: Velocities) -> tuple[Samples, Samples]:
    """Data and noise `(x_hat, z_hat)` that a velocity v at the point x_t of time t implies."""
    t = expand(jnp.abs(t), x_t)
    return x_t - t * v, x_t + (1 - t) * v


def clip(v: Velocities, limit: float) -> Velocities:
    """Clips to [-limit, limit]; a limit of 0 means no clipping."""
    return jnp.clip(v, -limit, limit) if limit else v

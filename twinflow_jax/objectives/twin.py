"""The network passes that the twin (fake) trajectory needs, shared by every form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.objectives import path


def concatenate(*trees):
    """Concatenates pytrees of arrays leaf by leaf along their rows."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=0), *trees)


def one_step(apply, params, z: Float[Array, "B ..."], cond) -> Float[Array, "B ..."]:
    """One-step samples `z - F(z, 1, 0)`."""
    ones = jnp.ones(z.shape[0], jnp.float32)
    return z - apply(params, z, ones, jnp.zeros_like(ones), cond)


def instantaneous_pair(
    apply, params, x_t: Float[Array, "B ..."], times, conds
) -> tuple[path.Velocity, path.Velocity]:
    """`F(x_t, t, t)` at the same points for two (time, cond) pairs, as one call of 2B rows."""
    t = jnp.concatenate(times)
    both = apply(params, jnp.concatenate([x_t, x_t]), t, t, concatenate(*conds))
    return both[: x_t.shape[0]], both[x_t.shape[0] :]


def fake_minus_real(
    apply,
    params,
    x_fake: Float[Array, "B ..."],
    z: Float[Array, "B ..."],
    t: Float[Array, "B"],
    cond,
) -> path.Velocity:
    """`F(x_t, -t, -t) - F(x_t, t, t)` at points x_t between x_fake and fresh noise z.

    It points from real velocities to fake ones: moving a generator's velocity against it
    moves its samples towards the data (paper equations 5 to 8; released `dist_match`).
    """
    x_t = path.interpolate(x_fake, z, t)
    fake, real = instantaneous_pair(apply, params, x_t, (-t, t), (cond, cond))
    return fake - real

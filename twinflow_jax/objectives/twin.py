"""The network passes that the twin (fake) trajectory needs, shared by every form."""

import jax.numpy as jnp

from twinflow_jax.arrays import Apply, Samples, Times, Velocities
from twinflow_jax.objectives import path
from twinflow_jax.objectives.direction import direction
from twinflow_jax.objectives.passes import Pass, together


def generator_pass(params, z: Samples, cond) -> Pass:
    """The pass whose velocity makes one-step samples `z - F(z, 1, 0)`."""
    ones = jnp.ones(z.shape[0], jnp.float32)
    return Pass(params, z, ones, jnp.zeros_like(ones), cond)


def instantaneous(params, x_t: Samples, times: tuple[Times, ...], conds: tuple) -> list[Pass]:
    """The passes `F(x_t, t, t)` at the same points, one for each time and cond."""
    return [Pass(params, x_t, t, t, cond) for t, cond in zip(times, conds, strict=True)]


def instantaneous_pair(
    apply: Apply, params, x_t: Samples, times: tuple[Times, Times], conds: tuple
) -> list[Velocities]:
    """`F(x_t, t, t)` at the same points for two (time, cond) pairs, as one call of 2B rows."""
    return together(apply, instantaneous(params, x_t, times, conds))


def twin_passes(params, x_fake: Samples, z: Samples, t: Times, cond) -> list[Pass]:
    """`F(x_t, -t, -t)` and `F(x_t, t, t)` at points x_t between x_fake and fresh noise z."""
    x_t = path.interpolate(x_fake, z, t)
    return instantaneous(params, x_t, (-t, t), (cond, cond))


def fake_minus_real(
    apply: Apply, params, x_fake: Samples, z: Samples, t: Times, cond
) -> Velocities:
    """The velocity of the fake trajectory less that of the real one, at `twin_passes`.

    It points from real velocities to fake ones: moving a generator's velocity against it
    moves its samples towards the data (the paper's L_rectify; released `dist_match`).
    """
    fake, real = together(apply, twin_passes(params, x_fake, z, t, cond))
    return direction("twin", real, fake)

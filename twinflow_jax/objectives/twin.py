"""The network passes that the twin (fake) trajectory needs, shared by every form."""

import jax
import jax.numpy as jnp

from twinflow_jax.arrays import Apply, Samples, Times, Velocities
from twinflow_jax.objectives import path
from twinflow_jax.objectives.direction import direction
from twinflow_jax.objectives.draws import normal
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


def draw(keys: jax.Array, rows: int, sample_shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """What is random in `targets`, by five keys."""
    return {
        "z": normal(keys[0], rows, sample_shape),
        "z_fake": normal(keys[1], rows, sample_shape),
        "t_fake": jax.random.uniform(keys[2], (rows,)),
        "z_rectify": normal(keys[3], rows, sample_shape),
        "t_rectify": jax.random.uniform(keys[4], (rows,)),
    }


def targets(
    apply: Apply, params, draws, cond, rectify_clip: float = 0.0
) -> dict[str, tuple[Velocities, Velocities]]:
    """What twin rows predict and should have, without gradient, by the name of the loss.

    adversarial (L_adv): F(x', -t', -t') and z' - x_fake, at fresh noise and time. rectify
    (L_rectify): F(z, 1, 0), and itself minus (fake - real), which rectify_clip limits; 0 does not.
    """
    z, t = draws["z"], draws["t_fake"]
    (v_one,) = together(apply, [generator_pass(params, z, cond)])
    x_fake = jax.lax.stop_gradient(z - v_one)
    v_fake = apply(params, path.interpolate(x_fake, draws["z_fake"], t), -t, -t, cond)
    gap = fake_minus_real(
        apply, jax.lax.stop_gradient(params), x_fake, draws["z_rectify"], draws["t_rectify"], cond
    )
    straight = jax.lax.stop_gradient(v_one - path.clip(gap, rectify_clip))
    return {
        "adversarial": (v_fake, path.velocity(x_fake, draws["z_fake"])),
        "rectify": (v_one, straight),
    }

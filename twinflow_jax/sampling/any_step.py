"""The any-step sampler (UCGM-S): one step, a few, or many, from the same network.

Each step predicts data and noise from the velocity at (x, t, r), optionally extrapolates both
against the step before, and moves to the next time with part of the predicted noise replaced
by fresh noise. The result is the last step's data prediction, before any extrapolation.

Source: `sampling_loop` of the released code (arXiv 2505.07447); state in float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from twinflow_jax.arrays import Apply, Samples
from twinflow_jax.objectives import path
from twinflow_jax.sampling.grids import Grid

Keys = Key[Array, ""] | Key[Array, "B"]  # one for all rows, or one for each


@partial(jax.jit, static_argnames=("apply", "grid"))
def sample(
    apply: Apply, params, noise: Samples, cond, grid: Grid, key: Keys
) -> Samples:
    """Samples from noise along the grid; `grid.nfe` evaluations of `apply`.

    key: of the fresh noise in stochastic steps, unused where there is none; or one key per row
    (B,), so that a row's result does not depend on the rows beside it.
    """
    return _run(apply, params, noise, cond, grid, key)[0]


@partial(jax.jit, static_argnames=("apply", "grid"))
def trajectory(
    apply: Apply, params, noise: Samples, cond, grid: Grid, key: Keys
) -> Float[Array, "{grid.steps}+1 B *shape"]:
    """The points that the sampler visits: the noise, then the state after each step."""
    states = _run(apply, params, noise, cond, grid, key)[1]
    return jnp.concatenate([noise[None].astype(jnp.float32), states])


def fresh_noise(key: Keys, i, shape: tuple[int, ...]) -> Samples:
    """Noise of step i, from one key for all rows or from one key per row."""
    if key.ndim == 0:
        return jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
    of_row = lambda k: jax.random.normal(jax.random.fold_in(k, i), shape[1:], jnp.float32)
    return jax.vmap(of_row)(key)


def _run(
    apply: Apply, params, noise: Samples, cond, grid: Grid, key: Keys
) -> tuple[Samples, Float[Array, "{grid.steps} B *shape"]]:
    """The last data prediction, and the states after each step."""
    rows, last = noise.shape[0], grid.steps - 1
    noise = noise.astype(jnp.float32)

    def predict(x, t, r):
        times = jnp.full((rows,), t, jnp.float32)
        v = apply(params, x, times, jnp.full((rows,), r, jnp.float32), cond)
        return path.predict(x, times, v.astype(jnp.float32))

    def step(carry, inputs, corrected: bool):
        x, (x_before, z_before) = carry
        i, now, then = inputs["i"], inputs["time"], inputs["next"]
        x_raw, z_raw = predict(x, now, inputs["target"])
        x_hat, z_hat = x_raw, z_raw
        if grid.extrapolation:
            ratio = jnp.where(i > 1, grid.extrapolation, 0.0)
            x_hat = x_raw + ratio * (x_raw - x_before)
            z_hat = z_raw + ratio * (z_raw - z_before)
        there = jnp.abs(then)
        z_next = z_hat
        if any(grid.stochastic):
            fresh = fresh_noise(key, i, x.shape)
            share = inputs["stochastic"]
            z_next = jnp.sqrt(1 - share) * z_hat + jnp.sqrt(share) * fresh
        x_next = (1 - there) * x_hat + there * z_next
        if corrected:
            x_next = correct(x, x_next, x_hat, z_hat, inputs)
        return (x_next, (x_raw, z_raw)), x_next

    def correct(x, x_next, x_hat, z_hat, inputs):
        """Repeats a step with the velocities of its two ends averaged (Heun).

        The released formula, x (1-u)/(1-t) + (u - (1-u) t/(1-t)) times the averaged noise, was
        never run there: it is the same step with the correction scaled by (1-u)/(1-t), which
        is 250 from t = .999 to u = .75 and infinite from t = 1. The second evaluation's r
        follows the style.
        """
        x_there, z_there = predict(x_next, inputs["next"], inputs["next_target"])
        v_mean = ((z_hat - x_hat) + (z_there - x_there)) / 2
        return x + (jnp.abs(inputs["next"]) - jnp.abs(inputs["time"])) * v_mean

    inputs = {
        "i": jnp.arange(grid.steps),
        "time": jnp.asarray(grid.times[:-1], jnp.float32),
        "next": jnp.asarray(grid.times[1:], jnp.float32),
        "target": jnp.asarray([grid.target(i) for i in range(grid.steps)], jnp.float32),
        "next_target": jnp.asarray([grid.target(i + 1) for i in range(grid.steps)], jnp.float32),
        "stochastic": jnp.asarray(grid.stochastic, jnp.float32),
    }
    carry = (noise, (jnp.zeros_like(noise), jnp.zeros_like(noise)))
    visited = []
    if last > 0:  # every step but the last may be corrected, and scans
        head = jax.tree.map(lambda a: a[:last], inputs)
        carry, states = jax.lax.scan(partial(step, corrected=grid.order == 2), carry, head)
        visited.append(states)
    tail = jax.tree.map(lambda a: a[last], inputs)
    (_, (x_hat, _)), end = step(carry, tail, corrected=False)
    return x_hat, jnp.concatenate([*visited, end[None]])

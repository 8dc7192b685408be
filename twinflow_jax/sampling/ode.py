"""Plain ODE sampling for multi-step base models: Euler or Heun, classifier-free guidance."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from twinflow_jax.arrays import Apply, Samples, Scalar, Velocities
from twinflow_jax.errors import UserError
from twinflow_jax.objectives import twin


def guide(with_cond: Velocities, without: Velocities, guidance: float) -> Velocities:
    """Classifier-free guidance: `without + guidance (with_cond - without)`."""
    return without + guidance * (with_cond - without)


def guided_velocity(
    apply: Apply, params, x: Samples, t: Scalar, cond, null_cond, guidance: float,
    rule: Callable = guide,
) -> Velocities:
    """The guided velocity at r = t, in float32; guidance 1 is one evaluation, without the null
    condition."""
    times = jnp.full(x.shape[:1], t, jnp.float32)
    if guidance == 1.0:
        v = apply(params, x, times, times, cond)
    else:
        pair = twin.instantaneous_pair(apply, params, x, (times, times), (cond, null_cond))
        v = rule(*pair, guidance)
    return v.astype(jnp.float32)


@partial(jax.jit, static_argnames=("apply", "times", "guidance", "method", "rule"))
def solve(
    apply: Apply, params, noise: Samples, cond, null_cond, times: tuple[float, ...],
    guidance: float = 1.0, method: str = "euler", rule: Callable = guide,
) -> Samples:
    """Integrates dx/dt = F(x, t, t) along `times` (from 1 down to 0) from noise to data.

    method: "euler", or "heun" with a second evaluation per step except the last. rule: how
    guidance combines the two velocities.
    NFE: (n or 2n - 1 for n steps) times 2 with guidance != 1.
    """
    if method not in ("euler", "heun"):
        raise UserError(f"method is {method!r}; choose 'euler' or 'heun'")
    velocity = lambda x, t: guided_velocity(
        apply, params, x, t, cond, null_cond, guidance, rule
    )

    def step(x, ends, second: bool):
        now, then = ends
        v = velocity(x, now)
        if second:
            v = (v + velocity(x + (then - now) * v, then)) / 2
        return x + (then - now) * v

    x = noise.astype(jnp.float32)
    grid = jnp.asarray(times, jnp.float32)
    if len(times) > 2:
        body = lambda x, ends: (step(x, ends, method == "heun"), None)
        x, _ = jax.lax.scan(body, x, (grid[:-2], grid[1:-1]))
    return step(x, (grid[-2], grid[-1]), False)

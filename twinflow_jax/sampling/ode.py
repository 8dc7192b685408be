"""Plain ODE sampling for multi-step base models: Euler or Heun, classifier-free guidance."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.errors import UserError
from twinflow_jax.objectives import path, twin


def guided_velocity(apply, params, x, t, cond, null_cond, guidance: float) -> path.Velocity:
    """`v_null + guidance (v_cond - v_null)` at r = t; guidance 1 is one evaluation, no null."""
    if guidance == 1.0:
        return apply(params, x, t, t, cond)
    with_cond, without = twin.instantaneous_pair(
        apply, params, x, (t, t), (cond, null_cond)
    )
    return without + guidance * (with_cond - without)


@partial(jax.jit, static_argnames=("apply", "times", "guidance", "method"))
def solve(
    apply, params, noise: Float[Array, "B ..."], cond, null_cond, times: tuple[float, ...],
    guidance: float = 1.0, method: str = "euler",
) -> Float[Array, "B ..."]:
    """Integrates dx/dt = F(x, t, t) along `times` (from 1 down to 0) from noise to data.

    method: "euler", or "heun" with a second evaluation per step except the last.
    NFE: (n or 2n - 1 for n steps) times 2 with guidance != 1.
    """
    if method not in ("euler", "heun"):
        raise UserError(f"method is {method!r}; choose 'euler' or 'heun'")
    rows = noise.shape[0]

    def velocity(x, t):
        t = jnp.full((rows,), t, jnp.float32)
        return guided_velocity(apply, params, x, t, cond, null_cond, guidance).astype(jnp.float32)

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

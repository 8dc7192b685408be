"""Recursive consistency (RCGM): what the jump from t to r should have been.

The network's jump `(t - r) F(x_t, t, r)` must equal a small step of size dt along the known
velocity followed by `order` teacher jumps from `t1 = max(t - dt, r)` to r. Released code:
`get_rcgm_target` and `multi_fwd`; paper: equation 1, special cases consistency (order 1,
r = 0), shortcut and MeanFlow (order 1).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.arrays import Apply, Samples, Times, Velocities
from twinflow_jax.objectives import path


def equal_times(t: Times, r: Times, order: int) -> list[Times]:
    """`order + 1` times from t to r in equal sub-steps (the released choice)."""
    return [t * (1 - i / order) + r * (i / order) for i in range(order + 1)]


def random_times(t: Times, r: Times, fractions: Float[Array, "B between"]) -> list[Times]:
    """Times from t to r with `t_i = r + fraction_i (t_{i-1} - r)` between (the paper's choice)."""
    times = [t]
    for i in range(fractions.shape[1]):
        times.append(r + fractions[:, i] * (times[-1] - r))
    return [*times, r]


def integrate(apply: Apply, params, x: Samples, times: list[Times], cond) -> Samples:
    """`sum_i (s_i - s_{i+1}) F(x_{s_i}, s_i, s_{i+1})` along the network's own jumps from x.

    Costs `len(times) - 1` evaluations of x's rows. A row whose times are all equal adds zero.
    """
    total = jnp.zeros_like(x)
    for start, end in zip(times[:-1], times[1:], strict=True):
        step = path.expand(start - end, x) * apply(params, x, start, end, cond)
        total = total + step
        x = x - step
    return total


def error(
    v_pred: Velocities, jumps: Samples, v: Velocities, t: Times, r: Times, dt: float | Times
) -> Velocities:
    """How far the network's jump is from `dt v + jumps`, per unit of dt, one for all rows or each.

    `((t - r) v_pred - jumps) / dt - v` where t - r >= dt; elsewhere the sub-steps span
    nothing and it is the flow-matching error `v_pred - v`. The released code divides by t - r
    on those rows, which is 0/0 at t = r; here nothing divides by a drawn time.
    """
    inside = path.expand(t < r + dt, v)
    unit = dt if isinstance(dt, float) else path.expand(dt, v)
    far = (path.expand(t - r, v) * v_pred - jumps) / unit
    return jnp.where(inside, v_pred, far) - v


def target(
    apply: Apply, params, v_pred: Velocities, x_t: Samples, v: Velocities, t: Times, r: Times,
    cond, config,
) -> Velocities:
    """`v_pred - clip(error)`, without gradient: the target of a loss on v_pred itself.

    Its gradient has factor 1 where the paper's equation 1 has (t - r) / dt (released choice).
    params: of the network that takes `config.order` equal sub-steps; config: order, dt, clip.
    """
    t_1 = jnp.maximum(t - config.dt, r)
    jumps = integrate(
        apply, params, x_t - config.dt * v, equal_times(t_1, r, config.order), cond
    )
    v_pred = jax.lax.stop_gradient(v_pred)
    return v_pred - path.clip(error(v_pred, jumps, v, t, r, config.dt), config.clip)

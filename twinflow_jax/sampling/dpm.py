"""DPM-Solver++(2M) on a flow: the multi-step sampling that SANA was published with."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from twinflow_jax.arrays import Apply, Samples
from twinflow_jax.sampling.ode import guide, guided_velocity


def coefficients(times: tuple[float, ...]) -> Float[np.ndarray, "{len(times)}-1 3"]:
    """Of each step `x <- a x + b x_hat + c x_hat_before`, in float64 (arXiv 2211.01095, 2M).

    A step solves exactly for a data prediction that is linear in lambda = log((1-t)/t); the
    first and the last one take it as constant, having nothing before or no end (lambda is
    infinite at t = 0).
    """
    times = np.asarray(times, np.float64)
    with np.errstate(divide="ignore"):
        lam = np.log1p(-times) - np.log(times)
    rows = []
    for i, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
        whole = (1 - then) - (1 - now) * then / now  # (1 - then) (1 - e^-h)
        ahead = 0.0
        if 0 < i < len(times) - 2:
            ahead = 0.5 * (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1])
        rows.append((then / now, whole * (1 + ahead), -whole * ahead))
    return np.asarray(rows)


@partial(jax.jit, static_argnames=("apply", "times", "told", "guidance", "rule"))
def dpm_solve(
    apply: Apply, params, noise: Samples, cond, null_cond, times: tuple[float, ...],
    told: tuple[float, ...], guidance: float = 1.0, rule: Callable = guide,
) -> Samples:
    """Samples along `times`, from just below 1 (where lambda is infinite) down to 0.

    told: the time that the network is given at each of times[:-1]. rule: how guidance combines
    the velocities with and without the prompt. NFE: one a step, two with guidance != 1.
    """

    def step(carry, inputs):
        x, before = carry
        v = guided_velocity(apply, params, x, inputs["told"], cond, null_cond, guidance, rule)
        x_hat = x - inputs["time"] * v
        a, b, c = inputs["coefficients"]
        return (a * x + b * x_hat + c * before, x_hat), None

    inputs = {
        "time": jnp.asarray(times[:-1], jnp.float32), "told": jnp.asarray(told, jnp.float32),
        "coefficients": jnp.asarray(coefficients(times), jnp.float32),
    }
    x = noise.astype(jnp.float32)
    (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), inputs)
    return x

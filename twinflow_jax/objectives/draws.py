"""Randomness as data: how times and noise are drawn, and how rows are cut by role.

An objective's `draw` returns `{role: {name: array with one row per sample}}`. Everything
random in a loss is in there, so that a step can be replayed or compared with another
implementation draw by draw. The rows of a batch stand in the order of the form's ROLES.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Draws = dict[str, dict[str, Array]]
Counts = dict[str, int]


def sample_times(
    key: jax.Array, rows: int, distribution: tuple[float, float, float]
) -> Float[Array, "{rows}"]:
    """Times `scale * Beta(a, b)` for distribution (a, b, scale); (1, 1, 1) is uniform on [0, 1).

    Source: `sample_beta` and `time_dist_ctrl` of the released src code.
    """
    a, b, scale = distribution
    if a == b == 1.0:
        return scale * jax.random.uniform(key, (rows,))
    return scale * jax.random.beta(key, a, b, (rows,))


def allocate(batch_size: int, ratios: dict[str, float]) -> Counts:
    """Rows per role: rounded shares, the remainder to the last role in use (released rule).

    Python's rounding (half to even), as in the released code.
    """
    total = sum(ratios.values())
    counts = {role: int(round(batch_size * share / total)) for role, share in ratios.items()}
    last = [role for role, share in ratios.items() if share > 0][-1]
    counts[last] = batch_size - sum(n for role, n in counts.items() if role != last)
    return counts


def rows_of(draws: Draws, role: str) -> int:
    """How many rows the draws hold for a role (0 when it is absent)."""
    return next(iter(draws[role].values())).shape[0] if role in draws else 0


def counts_of(draws: Draws, roles: tuple[str, ...]) -> Counts:
    """Rows per role that the draws hold."""
    return {role: rows_of(draws, role) for role in roles}


def cut(draws: Draws, roles: tuple[str, ...], start: int, stop: int) -> Draws:
    """The draws of batch rows start to stop; roles without a row there are absent."""
    part, offset = {}, 0
    for role in roles:
        rows = rows_of(draws, role)
        low, high = max(start - offset, 0), min(stop - offset, rows)
        if low < high:
            part[role] = jax.tree.map(lambda a: a[low:high], draws[role])  # noqa: B023
        offset += rows
    return part


def role_slices(counts: Counts) -> dict[str, slice]:
    """Where each role's rows stand in a batch in role order."""
    slices, offset = {}, 0
    for role, rows in counts.items():
        slices[role] = slice(offset, offset + rows)
        offset += rows
    return slices


def normal(key: jax.Array, rows: int, sample_shape: tuple[int, ...]) -> Float[Array, "{rows} ..."]:
    """Standard normal noise in float32, computed once: without the barrier XLA computes the inverse
    error function again in each fusion that reads it."""
    return jax.lax.optimization_barrier(
        jax.random.normal(key, (rows, *sample_shape), jnp.float32)
    )

"""Network passes that share calls.

Where many devices share the weights, a pass costs their gathering, and rows that do not fill the
devices cost as much as full ones: passes that do not wait for each other belong in one call.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.arrays import Apply, Samples, Times, Velocities


class Pass(NamedTuple):
    """What `apply` is called with."""

    params: Any
    x_t: Samples
    t: Times
    r: Times
    cond: Any


def concatenate(*trees):
    """Concatenates pytrees of arrays leaf by leaf along their rows."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=0), *trees)


def together(apply: Apply, passes: list[Pass]) -> list[Float[Array, "_ ..."]]:
    """The velocities of each pass; those with the very same params come from one call."""
    found: dict[int, Array] = {}
    for params in {id(each.params): each.params for each in passes}.values():
        mine = [i for i, each in enumerate(passes) if each.params is params]
        joined = apply(params, *concatenate(*(passes[i][1:] for i in mine)))
        start = 0
        for i in mine:
            rows = passes[i].t.shape[0]
            found[i] = joined[start : start + rows]
            start += rows
    return [found[i] for i in range(len(passes))]


class Carrier:
    """An `apply` that takes one waiting pass along with each of its calls."""

    def __init__(self, apply: Apply, waiting: list[Pass]):
        self._apply, self._waiting, self._done = apply, list(waiting), []

    def __call__(self, params, x_t: Samples, t: Times, r: Times, cond) -> Velocities:
        calls = [Pass(params, x_t, t, r, cond), *self._waiting[:1]]
        self._waiting = self._waiting[1:]
        mine, *others = together(self._apply, calls)
        self._done += others
        return mine

    def collect(self) -> list[Float[Array, "_ ..."]]:
        """The velocities of the passes that it was given, in their order."""
        if self._waiting:
            self._done += together(self._apply, self._waiting)
        self._waiting = []
        return self._done

"""Names for the axes of activations, where a partitioner must not choose by itself.

They mean nothing until rules map them to a mesh (`parallel.applied`); without, these functions
return their argument.
"""

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array


def constrain(x: Array, *names: str | None) -> Array:
    """x with its axes laid out as the rules say for these names; None, or what the mesh does
    not divide: whole."""
    rules, mesh = dict(nn.get_logical_axis_rules()), jax.sharding.get_abstract_mesh()
    if not rules or mesh.empty:
        return x
    spec = []
    for size, name in zip(x.shape, names, strict=True):
        axis = rules.get(name)
        spec.append(axis if axis and size % mesh.shape[axis] == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def rows(x: Array) -> Array:
    """x split along its first axis, the batch, and nowhere else."""
    return constrain(x, "rows", *(None,) * (x.ndim - 1))

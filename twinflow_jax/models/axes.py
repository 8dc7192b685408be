"""Names for axes: of parameters, and of activations where a partitioner must not choose by itself.

They mean nothing until rules map them to a mesh (`parallel.applied`); without, these functions
return their argument.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float


def init_of(init: Callable, *axes: str | None) -> Callable:
    """An initialiser whose parameter's axes have names."""
    return nn.with_logical_partitioning(init, axes)


def spec(shape: tuple[int, ...], names: tuple[str | None, ...]) -> PartitionSpec | None:
    """Where the rules put an array with these names for its axes; None where there is no choice.

    An axis without a name, or that its mesh axes do not divide, is whole. There is no choice
    without a mesh; inside a map over some of its axes, the others are left to choose.
    """
    rules, mesh = dict(nn.get_logical_axis_rules()), jax.sharding.get_abstract_mesh()
    free = _free(mesh)
    if not rules or not free:
        return None
    entries = []
    for size, name in zip(shape, names, strict=True):
        entry = tuple(axis for axis in rules.get(name, ()) if axis in free)
        parts = math.prod(mesh.shape[axis] for axis in entry)
        entries.append(entry if entry and size % parts == 0 else None)
    return PartitionSpec(*entries)


def _free(mesh) -> set[str]:
    """The axes of a mesh that no map around us has taken."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True) if not mesh.empty else ()
    return {name for name, kind in types if kind == AxisType.Auto}


def constrain(x: Array, *names: str | None) -> Array:
    """x with its axes laid out as the rules say for these names; None, or what the mesh does
    not divide: whole."""
    layout = spec(x.shape, names)
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout)


def rows(x: Array) -> Array:
    """x split along its first axis, the batch, and nowhere else."""
    return constrain(x, "rows", *(None,) * (x.ndim - 1))


def tokens(x: Array) -> Array:
    """x (B, S, ...) split along the batch and along the tokens, and nowhere else."""
    return constrain(x, "rows", "tokens", *(None,) * (x.ndim - 2))


def locally(function: Callable, *arguments: tuple[Array, tuple[str | None, ...]]) -> Array:
    """`function(*arrays)` on each device's own part; the result lies as the first array does.

    For kernels that a partitioner cannot split. arguments: arrays with the names of their axes.
    """
    layouts = [spec(x.shape, names) for x, names in arguments]
    arrays = [x for x, _ in arguments]
    if layouts[0] is None:
        return function(*arrays)
    return jax.shard_map(
        function, in_specs=tuple(layouts), out_specs=layouts[0], check_vma=False,
        axis_names=_free(jax.sharding.get_abstract_mesh()),
    )(*arrays)


def contract_in_place(
    x: Float[Array, "B K D"], kernel: Float[Array, "layers D E"]
) -> Float[Array, "layers B K E"]:
    """`x @ kernel` of all layers, the kernel staying where it lies: for kernels far larger than x.

    Each device multiplies its part of D for all rows, and the rows' sums come home to the
    devices that have the rows.
    """
    product = lambda x, kernel: jnp.einsum("bkd,ldm->lbkm", x, kernel)
    rules = dict(nn.get_logical_axis_rules())
    at_home = spec(kernel.shape, (None, "embed", "modulation"))
    if at_home is None or at_home[1] is None:
        return product(x, kernel)
    mesh = jax.sharding.get_abstract_mesh()
    batch, inner = rules["rows"], rules["embed"]
    outer = rules["modulation"] if at_home[2] is not None else ()
    rows, parts = x.shape[0], math.prod(mesh.shape[axis] for axis in batch)
    width = x.shape[2] // math.prod(mesh.shape[axis] for axis in inner)

    def local(x, kernel):
        for axis in reversed(inner):
            x = jax.lax.all_gather(x, axis, axis=0, tiled=True)
        mine = jax.lax.axis_index(inner) * width
        terms = product(jax.lax.dynamic_slice_in_dim(x, mine, width, axis=2), kernel)
        for axis in inner:
            terms = jax.lax.psum_scatter(terms, axis, scatter_dimension=1, tiled=True)
        for axis in outer:
            terms = jax.lax.all_gather(terms, axis, axis=3, tiled=True)
        return terms

    x = jnp.pad(x, ((0, -rows % parts), (0, 0), (0, 0)))
    return jax.shard_map(
        local, in_specs=(PartitionSpec(batch), at_home), out_specs=PartitionSpec(None, batch),
        check_vma=False,
    )(x, kernel)[:, :rows]

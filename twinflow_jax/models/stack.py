"""Layers one after the other, in one compiled loop over their stacked weights.

A network may have several such stacks, each under a name of its own at the top of its tree.

How a layer comes by its weights is a mesh's business: on one device they are at hand, on many
they may have to be gathered first. `placed` says so from outside (`parallel.strategies` does),
and networks need not know.
"""

import contextvars
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from twinflow_jax.models import int8, remat
from twinflow_jax.models.context import setting

AXIS = "layers"  # the first logical axis of every parameter of a stack, and of no other


@dataclasses.dataclass(frozen=True)
class Placement:
    """fetch: what the mesh holds of a layer's weights -> the weights; computed again in the
    backward pass, where the layer is. around: `(loop, carry, weights, per_layer, per_row) ->
    carry`, calls the loop, perhaps on each device's rows.
    """

    fetch: Callable[[Any], Any] = lambda weights: weights
    around: Callable[..., Any] = lambda loop, *arguments: loop(*arguments)


_placements = contextvars.ContextVar("placements")


def placed(placements: Callable[[str], Placement]):
    """Networks that are traced inside run their layers so. placements: of the stack of a name."""
    return setting(_placements, placements)


def names(axes: Mapping[str, Any]) -> tuple[str, ...]:
    """The stacks of a network. axes: the logical ones of its parameters (`logical_axes`)."""
    is_axes = lambda leaf: isinstance(leaf, tuple)
    first = lambda tree: {leaf[:1] for leaf in jax.tree.leaves(tree, is_leaf=is_axes)}
    return tuple(name for name, tree in axes.items() if (AXIS,) in first(tree))


def run_layers(
    module: nn.Module, block: type[nn.Module], length: int, policy: str, carry,
    per_layer: tuple = (), per_row: tuple = (), constants: tuple = (), name: str = "layers",
):
    """The carry after `length` blocks, whose parameters are `name` of the calling module, which
    is a whole network.

    block: called as `block(module.config)(carry, *per_layer, *per_row, *constants)`, gives
    `(carry, None)`. carry: arrays with rows first. per_layer: arrays (length, rows, ...), of
    which each block gets its own. per_row: arrays (rows, ...) or None; constants: NumPy arrays
    that are the same for every row. policy: one of remat.POLICIES.
    """
    if module.is_initializing():
        shared = (nn.broadcast,) * (len(per_row) + len(constants))
        layers = nn.scan(
            block, length=length, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=(0,) * len(per_layer) + shared, metadata_params={nn.PARTITION_NAME: AXIS},
        )
        return layers(module.config, name=name)(carry, *per_layer, *per_row, *constants)[0]
    placement = _placements.get(lambda _: Placement())(name)
    network = block(module.config, parent=None)

    def loop(carry, weights, per_layer, per_row):
        def layer(carry, own):
            weights, per_layer = own
            params = int8.dequantised(placement.fetch(weights), module.config.dtype)
            inputs = (*per_layer, *per_row, *constants)
            return network.apply({"params": params}, carry, *inputs)

        return jax.lax.scan(remat.recomputed(layer, policy), carry, (weights, per_layer))[0]

    weights = nn.meta.unbox(module.variables["params"][name])
    return placement.around(loop, carry, weights, per_layer, per_row)

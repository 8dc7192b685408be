"""How the layers' weights, which are split over `fsdp`, come together for computing.

| strategy | when | memory | communication |
|---|---|---|---|
| partitioner | the compiler decides, told to gather layer by layer | least | |
| gather_layers | each layer, in each pass, on each device's own rows | least | most |
| gather_once | all layers, once in a step, kept in the dtype of computation | most | least |

The last two run the layers inside a map over the axes that split rows, so that collectives are
those written here: real gathers, and gradients that are born split (reduce-scatter); tensor and
context axes are left to the partitioner. Neither networks nor objectives nor the train step know
any of this: `Strategy.applied` is what they are traced in, `Strategy.weights` what they are given.
"""

import abc
import contextlib
import dataclasses
import functools
import math
from typing import Any, no_type_check

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from twinflow_jax.errors import UserError
from twinflow_jax.models import attention, stack
from twinflow_jax.models.stack import Placement
from twinflow_jax.parallel.mesh import BATCH, row_parts
from twinflow_jax.parallel.rules import RULES, shardings


@no_type_check  # layouts of weights, and what JAX fills trees with, are built as weights
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """A weight of all layers: `part`, which is trained, and `whole`, each device's copy of it
    (devices, layers, ...), which is read."""

    part: jax.Array
    whole: jax.Array


@dataclasses.dataclass(frozen=True)
class Strategy(abc.ABC):
    """A network's weights on a mesh. A strategy derives from this, says how one stack's layers come
    by their weights (`placement`), and stands in STRATEGIES.

    layouts: of its parameters (`parallel.shardings`). stacks: the names of its stacks of layers.
    dtype: of computation.
    """

    mesh: Mesh
    layouts: Any
    stacks: tuple[str, ...]
    dtype: str

    @abc.abstractmethod
    def placement(self, name: str) -> Placement:
        """How the layers of a stack come by their weights, and are run."""

    def hold(self, params) -> Any:
        """What a step keeps of `params`, for `weights`; None for nothing."""
        return None

    def weights(self, params, held) -> Any:
        """What the network's `apply` takes; gradients reach `params`."""
        return params

    @contextlib.contextmanager
    def applied(self):
        """Trace and lower inside: layers then run by this strategy, and the names that models
        give to activations mean this mesh."""
        with applied(self.mesh), stack.placed(self.placement):
            yield

    def _sent(self, part):
        """A weight as it travels: in the dtype of computation, unless in int8."""
        return part if part.dtype == jnp.int8 else part.astype(self.dtype)

    def _specs(self, name: str):
        """Of a stack's weights."""
        return jax.tree.map(lambda layout: layout.spec, self.layouts[name])

    def _filled(self, run):
        """`run(loop, carry, ...)` with rows that the mesh divides: copies of rows fill them up."""
        def around(loop, carry, weights, per_layer, per_row):
            rows = jax.tree.leaves(carry)[0].shape[0]
            fill = functools.partial(_fill, rows=-rows % row_parts(self.mesh))
            carry, per_row = jax.tree.map(fill, (carry, per_row))
            per_layer = jax.tree.map(functools.partial(fill, axis=1), per_layer)
            carry = run(loop, carry, weights, per_layer, per_row)
            return jax.tree.map(lambda a: a[:rows], carry)

        return around


class Partitioner(Strategy):
    """The partitioner gathers a layer's weights."""

    def placement(self, name: str) -> Placement:
        def gather(part, spec):
            spec = _without_layers(spec)
            at = _split_at(spec)
            if at is None:
                return part
            whole = PartitionSpec(*spec[:at], None, *spec[at + 1 :])
            return jax.lax.with_sharding_constraint(self._sent(part), whole)

        return Placement(
            fetch=lambda weights: jax.tree.map(gather, weights, self._specs(name)),
            around=self._filled(lambda loop, *arguments: loop(*arguments)),
        )


class GatherLayers(Strategy):
    """Each layer's weights are gathered where the layer runs, in each pass."""

    def placement(self, name: str) -> Placement:
        """Layers run inside a map over the axes that split rows."""
        over_fsdp = self._specs_over_fsdp(name)

        def fetch(weights):
            def one(part, spec):
                spec = _without_layers(spec)
                if _held(part):
                    return _use(part.part, part.whole, spec)
                return self._gather(part, spec)

            return jax.tree.map(one, weights, over_fsdp, is_leaf=_held)

        def mapped(loop, carry, weights, per_layer, per_row):
            def local(carry, weights, per_layer, per_row):
                own = lambda w: dataclasses.replace(w, whole=w.whole[0]) if _held(w) else w
                return loop(carry, jax.tree.map(own, weights, is_leaf=_held), per_layer, per_row)

            by_row, by_layer = PartitionSpec(BATCH), PartitionSpec(None, BATCH)
            specs = jax.tree.map(
                lambda weight, spec: Held(spec, by_row) if _held(weight) else spec,
                weights, over_fsdp, is_leaf=_held,
            )
            return jax.shard_map(
                local, in_specs=(by_row, specs, by_layer, by_row), out_specs=by_row,
                axis_names=self._mapped_axes, check_vma=False,
            )(carry, weights, per_layer, per_row)

        return Placement(fetch, self._filled(mapped))

    @property
    def _mapped_axes(self) -> set[str]:
        """Those that split rows; all, where the others split nothing: the compiler then leaves
        every collective as it is written."""
        others = self.mesh.size // row_parts(self.mesh)
        return set(BATCH) if others > 1 else set(self.mesh.axis_names)

    def _specs_over_fsdp(self, name: str):
        """What a map over the rows' axes has to know of them; the rest is the partitioner's."""
        kept = lambda spec: PartitionSpec(*(axis if axis == "fsdp" else None for axis in spec))
        return jax.tree.map(kept, self._specs(name))

    def _gather(self, part, spec):
        """The whole of a weight, from inside the map; its gradient is scattered again."""
        at = _split_at(spec)
        if at is None:
            return part
        return jax.lax.all_gather(self._sent(part), "fsdp", axis=at, tiled=True)


class GatherOnce(GatherLayers):
    """All layers' weights are gathered once in a step, and kept."""

    def hold(self, params) -> Any:
        return {
            name: jax.tree.map(self._gather_all, params[name], self._specs_over_fsdp(name))
            for name in self.stacks
        }

    def weights(self, params, held) -> Any:
        join = lambda part, whole: part if whole is None else Held(part, whole)
        return params | {
            name: jax.tree.map(join, params[name], copies) for name, copies in held.items()
        }

    def _gather_all(self, part, spec):
        """Each device's copy of a weight (devices, layers, ...), or None where it is whole."""
        if _split_at(spec) is None:
            return None
        gather = lambda x: self._gather(x, spec)[None]
        return jax.shard_map(
            gather, mesh=self.mesh, in_specs=spec, out_specs=PartitionSpec(BATCH),
            axis_names=self._mapped_axes, check_vma=False,
        )(jax.lax.stop_gradient(part))


STRATEGIES: dict[str, type[Strategy]] = {
    "partitioner": Partitioner, "gather_layers": GatherLayers, "gather_once": GatherOnce,
}


def create(name: str, mesh: Mesh, abstract, axes, dtype: str) -> Strategy:
    """The strategy of that name, one of STRATEGIES, for a network with these parameters.

    Raises:
      UserError: it does not go with the network.
    """
    stacks = stack.names(axes)
    if name != "partitioner" and not stacks:
        raise UserError(
            f"mesh.strategy {name!r} is for networks with stacked layers; this one has none: use "
            "mesh.strategy=partitioner"
        )
    return STRATEGIES[name](mesh, shardings(mesh, abstract, axes), stacks, dtype)


@contextlib.contextmanager
def applied(mesh: Mesh):
    """Trace and lower inside: the names that models give to activations then mean this mesh."""
    platform = mesh.devices.flat[0].platform
    with (
        jax.set_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())),
        attention.compiled_for("gpu" if platform in ("cuda", "rocm") else platform),
    ):
        yield


def _held(weight) -> bool:
    return isinstance(weight, Held)


def _split_at(spec: PartitionSpec) -> int | None:
    """The dimension that is split over fsdp."""
    entries = list(spec)
    return entries.index("fsdp") if "fsdp" in entries else None


def _without_layers(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*spec[1:])


def _fill(x: jax.Array, rows: int, axis: int = 0) -> jax.Array:
    """x with so many more rows, copies of its own: values that every layer can compute."""
    if rows == 0:
        return x
    copies = math.ceil(rows / x.shape[axis])
    more = jax.lax.slice_in_dim(jnp.concatenate([x] * copies, axis), 0, rows, axis=axis)
    return jnp.concatenate([x, more], axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _use(part: jax.Array, whole: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`whole`, whose gradient is added up over the devices and split as `part` is."""
    return whole


def _use_forward(part, whole, spec):
    return whole, jnp.zeros((0,), part.dtype)  # of its dtype only


def _use_backward(spec, of_part, gradient):
    at = _split_at(spec)
    scattered = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=at, tiled=True)
    return scattered.astype(of_part.dtype), None


_use.defvjp(_use_forward, _use_backward)

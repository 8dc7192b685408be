"""One table: the logical axes that models name -> the mesh axes that they are split over."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from twinflow_jax.models import names
from twinflow_jax.models.int8 import Quantised, is_quantised
from twinflow_jax.parallel.mesh import BATCH, AnyMesh

RULES = {
    # Of activations.
    "rows": BATCH,
    "tokens": ("context",),
    # Of weights: their input side, since splitting the output side costs copies on a TPU.
    "embed": ("fsdp",),
    "text": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "modulation": ("tensor",),
    "vocab": ("tensor",),
    "adapter": ("fsdp",),  # the side of an adapter's halves that is not its rank
}


def layout(shape: tuple[int, ...], axes: tuple, mesh: AnyMesh) -> tuple[PartitionSpec, list[str]]:
    """Where a parameter with these logical axes lies, and why a rule did not apply.

    A rule does not apply where the dimension does not divide, or where an earlier dimension of
    the same parameter has taken its mesh axes.
    """
    entries, used, reasons = [], set(), []
    for size, name in zip(shape, axes, strict=False):
        entry = tuple(axis for axis in RULES.get(name, ()) if mesh.shape[axis] > 1)
        parts = math.prod(mesh.shape[axis] for axis in entry)
        if used & set(entry):
            reasons.append(f"{name}: {', '.join(entry)} is taken")
        elif size % parts:
            reasons.append(f"{name}: {size} does not divide by {parts}")
        else:
            entries.append(entry or None)
            used |= set(entry)
            continue
        entries.append(None)
    return PartitionSpec(*entries), reasons


def shardings(mesh: AnyMesh, abstract, axes):
    """A layout for each parameter: abstract shapes, and logical axes of the same tree. Kernels in
    int8 lie as others do, their scales whole."""
    def one(leaf, names):
        of = NamedSharding(mesh, layout(leaf.shape, names, mesh)[0])
        return Quantised(of, NamedSharding(mesh, PartitionSpec())) if is_quantised(leaf) else of

    return jax.tree.map(one, abstract, axes, is_leaf=is_quantised)


@dataclasses.dataclass(frozen=True)
class Placed:
    """One line of a report: where a parameter lies. bytes: on each device."""

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    bytes: int
    reasons: list[str]


def report(mesh: AnyMesh, abstract, axes) -> list[Placed]:
    """Where each parameter lies, the largest on a device first."""
    lines, axes = [], names.flatten(axes)
    for path, leaf in names.flatten(abstract).items():
        spec, reasons = layout(leaf.shape, axes[path], mesh)
        local = NamedSharding(mesh, spec).shard_shape(leaf.shape)
        size = math.prod(local) * np.dtype(leaf.dtype).itemsize
        lines.append(Placed(path, leaf.shape, spec, size, reasons))
    return sorted(lines, key=lambda line: -line.bytes)

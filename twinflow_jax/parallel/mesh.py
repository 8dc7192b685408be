"""The mesh: which devices share what."""

import contextlib

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from twinflow_jax.parallel.rules import RULES

AXES = ("fsdp", "tensor")


def make_mesh(tensor: int = 1, devices: list | None = None) -> Mesh:
    """All devices as (fsdp, tensor): weights are split over both, rows over `fsdp`.

    tensor: devices that share the heads and hidden units of each layer; divides their number.
    """
    devices = devices or jax.devices()
    shape = (len(devices) // tensor, tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


@contextlib.contextmanager
def applied(mesh: Mesh):
    """Trace and lower inside: the names that models give to activations then mean this mesh."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())):
        yield


def over_rows(mesh: Mesh, rows: int) -> NamedSharding:
    """Rows split over `fsdp` where they divide, otherwise on every device."""
    axis = "fsdp" if rows % mesh.shape["fsdp"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(axis))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())

"""The mesh: which devices share what."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from twinflow_jax import keys
from twinflow_jax.errors import UserError
from twinflow_jax.keys import option

BATCH = ("data", "fsdp")
AXES = (*BATCH, "tensor", "context")

AnyMesh = Mesh | AbstractMesh  # of devices, or of their shape alone

# Kinds whose chips reach each other over their whole slice only: the compiler takes a program for
# all of a slice or for one chip ("limited ICI routing").
WHOLE_OR_ONE = ("TPU v5 lite", "TPU v6 lite")


@dataclasses.dataclass(frozen=True)
class MeshConfig(keys.Part):
    """How many devices share what; their product is the number of devices."""

    section: ClassVar[str] = "mesh"

    data: int = option(
        0,
        "copies of the weights, each with its own rows; 0: one for each slice of TPUs, which a "
        "slower network joins", least=0,
    )
    fsdp: int = option(
        0, "parts of the weights, each with its own rows; 0: the devices that are left", least=0
    )
    tensor: int = option(1, "parts of the heads and hidden units of each layer", least=1)
    context: int = option(
        0, "parts of an image's tokens; 0: what the rows of a batch cannot fill", least=0
    )

    def filled(self, devices: int, rows: int = 0, slices: int = 1) -> "MeshConfig":
        """Without zeros, for this number of devices, of rows in a batch and of slices.

        Raises:
          UserError: the axes do not multiply to the devices, or slices do not divide data.
        """
        mesh = dataclasses.replace(self, data=self.data or slices)
        if mesh.data % slices:
            raise UserError(
                f"mesh.data is {mesh.data}, which {slices} slices do not divide: each holds whole "
                "copies of the weights"
            )
        if mesh.context == 0:  # the least that lets data x fsdp divide the rows
            fits = (
                c for c in range(1, devices + 1)
                if devices % (mesh.tensor * c) == 0 and rows % (devices // (mesh.tensor * c)) == 0
            )
            mesh = dataclasses.replace(mesh, context=next(fits, 1))
        rest = mesh.data * mesh.tensor * mesh.context
        if mesh.fsdp == 0 and devices % rest == 0:
            return dataclasses.replace(mesh, fsdp=devices // rest)
        if mesh.fsdp * rest != devices:
            axes = f"data {mesh.data} x fsdp {mesh.fsdp or '?'} x tensor {mesh.tensor}"
            raise UserError(
                f"mesh: {axes} x context {mesh.context} does not multiply to {devices} devices; "
                "set mesh.fsdp=0 for what is left, and the others to divisors of the number"
            )
        return mesh


def make_mesh(
    config: MeshConfig = MeshConfig(), devices: list | None = None, rows: int = 0  # noqa: B008
) -> Mesh:
    """All devices with AXES, for batches of so many rows; neighbours on a TPU's torus are
    neighbours on the mesh.

    Raises:
      UserError: the axes do not multiply to the devices, or do not fit the torus.
    """
    devices = devices or jax.devices()
    slices = len({slice_of(device) for device in devices})
    config = config.filled(len(devices), rows, slices)
    shape = (config.data, config.fsdp, config.tensor, config.context)
    try:
        if slices > 1:
            inner = (config.data // slices, *shape[1:])
            grid = mesh_utils.create_hybrid_device_mesh(
                inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
            )
        else:
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"mesh {shape} does not fit these devices: {error}") from error
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_of(device) -> int:
    """The slice of TPUs that a device belongs to; 0 where there is only one."""
    return getattr(device, "slice_index", 0) or 0


def own_devices(devices: Sequence | None = None, process: int | None = None) -> list:
    """Devices of a process that run programs of its own together: all that it has, or one of a
    slice of WHOLE_OR_ONE that it shares with other processes.

    devices: of all processes; process: which one. Default: as JAX knows them here.
    """
    devices = jax.devices() if devices is None else devices
    process = jax.process_index() if process is None else process
    own = [device for device in devices if device.process_index == process]
    here = {slice_of(device) for device in own}
    shared = any(slice_of(one) in here for one in devices if one.process_index != process)
    return own[:1] if shared and own[0].device_kind in WHOLE_OR_ONE else own


def on_device(tree) -> int:
    """Bytes of abstract arrays on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def room(device: jax.Device) -> int | None:
    """Bytes of memory that a device has: on a CPU its share of the machine's; None if unknown."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def over_rows(mesh: AnyMesh, rows: int) -> NamedSharding:
    """Rows split over BATCH where they divide, otherwise on every device."""
    return NamedSharding(mesh, PartitionSpec(BATCH if rows % row_parts(mesh) == 0 else None))


def over_devices(mesh: AnyMesh, rows: int) -> NamedSharding:
    """Rows split over every axis where they divide: for networks whose weights are not split."""
    return NamedSharding(mesh, PartitionSpec(AXES if rows % mesh.size == 0 else None))


def row_parts(mesh: AnyMesh) -> int:
    """Parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def replicated(mesh: AnyMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())

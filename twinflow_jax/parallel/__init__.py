"""Meshes of devices, and how parameters and batches lie on them."""

from twinflow_jax.parallel.mesh import (
    BATCH,
    MeshConfig,
    make_mesh,
    on_device,
    over_devices,
    over_rows,
    own_devices,
    replicated,
    room,
    row_parts,
)
from twinflow_jax.parallel.rules import RULES, report, shardings
from twinflow_jax.parallel.strategies import STRATEGIES, Strategy, applied, create

__all__ = [
    "BATCH", "RULES", "STRATEGIES", "MeshConfig", "Strategy", "applied", "create", "make_mesh",
    "on_device", "over_devices", "over_rows", "own_devices", "replicated", "report", "room",
    "row_parts", "shardings",
]

"""Meshes of devices, and how parameters and batches lie on them."""

from twinflow_jax.parallel.mesh import applied, make_mesh, over_rows, replicated
from twinflow_jax.parallel.rules import RULES, shardings

__all__ = ["RULES", "applied", "make_mesh", "over_rows", "replicated", "shardings"]

"""Meshes of devices, and how parameters and batches lie on them."""

from twinflow_jax.parallel.mesh import make_mesh, over_rows, replicated
from twinflow_jax.parallel.rules import RULES, shardings

__all__ = ["RULES", "make_mesh", "over_rows", "replicated", "shardings"]

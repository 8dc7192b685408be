"""Turning noise into samples: the any-step sampler and the base models' ODE solvers."""

from twinflow_jax.sampling.any_step import sample, trajectory
from twinflow_jax.sampling.batched import by_class, counted, generate
from twinflow_jax.sampling.dpm import dpm_solve
from twinflow_jax.sampling.grids import RECOMMENDED, Grid, few_step, make_grid, recommended
from twinflow_jax.sampling.ode import guide, solve
from twinflow_jax.sampling.schedules import Schedule, published

__all__ = [
    "RECOMMENDED", "Grid", "Schedule", "by_class", "counted", "dpm_solve", "few_step", "generate",
    "guide", "make_grid", "published", "recommended", "sample", "solve", "trajectory",
]

"""Turning noise into samples: the any-step sampler and the base models' ODE solvers."""

from twinflow_jax.sampling.any_step import sample, trajectory
from twinflow_jax.sampling.batched import generate
from twinflow_jax.sampling.grids import RECOMMENDED, Grid, few_step, make_grid, recommended
from twinflow_jax.sampling.ode import solve
from twinflow_jax.sampling.schedules import published_times

__all__ = [
    "RECOMMENDED", "Grid", "few_step", "generate", "make_grid", "published_times",
    "recommended", "sample", "solve", "trajectory",
]

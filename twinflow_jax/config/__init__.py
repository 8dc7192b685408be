"""A run's description, and how it is read: from config files, overrides and records of runs."""

from twinflow_jax.config.files import flatten, load, parse, to_json
from twinflow_jax.config.run import RANDOM, Data, Mesh, Optimizer, Run, Sample, Train

__all__ = [
    "RANDOM", "Data", "Mesh", "Optimizer", "Run", "Sample", "Train", "flatten", "load",
    "parse", "to_json",
]

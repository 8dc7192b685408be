"""Runs on disk: their config, checkpoints of their state, and the weights to sample from."""

from twinflow_jax.checkpoints.run import (
    RANDOM,
    check_claim,
    claim,
    load_weights,
    open_weights,
    pipeline_of,
    read_config,
    steps_of,
)
from twinflow_jax.checkpoints.saver import Saver

__all__ = [
    "RANDOM", "Saver", "check_claim", "claim", "load_weights", "open_weights", "pipeline_of",
    "read_config", "steps_of",
]

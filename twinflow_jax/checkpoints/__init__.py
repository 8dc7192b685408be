"""Runs on disk: their config, checkpoints of their state, and the weights to sample from."""

from twinflow_jax.checkpoints.carrying import Carrier
from twinflow_jax.checkpoints.run import (
    base_of,
    check_claim,
    claim,
    load_weights,
    open_start,
    open_weights,
    pipeline_of,
    read_run,
    steps_of,
)
from twinflow_jax.checkpoints.saver import Saver

__all__ = [
    "Carrier", "Saver", "base_of", "check_claim", "claim", "load_weights", "open_start",
    "open_weights", "pipeline_of", "read_run", "steps_of",
]

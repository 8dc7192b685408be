"""Data: sources of labelled images, and deterministic batches of them."""

from twinflow_jax.data.batches import Stream, batches
from twinflow_jax.data.sources import SOURCES, Dataset, Split, load, to_rgb

__all__ = ["SOURCES", "Dataset", "Split", "Stream", "batches", "load", "to_rgb"]

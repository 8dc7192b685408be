"""How good samples are: an independent classifier's view, and distances to real data."""

from twinflow_jax.evaluation.judge import Judge, sample_labels

__all__ = ["Judge", "sample_labels"]

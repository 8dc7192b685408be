"""How good samples are: an independent network's view, and distances to real data."""

from twinflow_jax.evaluation.judge import ClassJudge, Judge, sample_labels

__all__ = ["ClassJudge", "Judge", "sample_labels"]

"""TwinFlow on MNIST-5k: handwritten digits in one network evaluation.

    python -m twinflow_jax.train --config configs/mnist.py --workdir runs/mnist

Four minutes on 2 cores. At 1, 2 and 4 NFE Frechet distance 20.9, 22.7 and 24.9, accuracy .995 and
more, diversity .79 to .82 of real (seed 42; real held-out digits .983, training against held-out
4.6).

Variants, as `configs/mnist.py:NAME`:
  (none)         few twin rows, a heavier rectification and a higher rate: best at one evaluation
  released       the roles in equal parts, as released
  twin_meanflow  improved MeanFlow with the twin losses on a twentieth of its rows
                 (seed 42: 18.2, 20.7 and 26.3, accuracy .988 and more; it takes a JVP)
"""

import ml_collections

from twinflow_jax import objectives
from twinflow_jax.training import defaults, variants


def get_config(variant: str = "twinflow") -> ml_collections.ConfigDict:
    return variants.choose(
        variant, twinflow=twinflow, released=released, twin_meanflow=twin_meanflow
    )


def released() -> ml_collections.ConfigDict:
    config = defaults.get()
    config.data.update(name="mnist5k", batch_size=256)
    config.model = {
        "name": "mlp", "sample_shape": (28, 28, 1), "width": 256, "depth": 4, "num_classes": 10,
        "times": "sinusoid", "estimates": "picture",
    }
    # The released roles with plain L2: digits are few, and its larger gradients for rows that
    # are far from their target train faster than Barron's equal ones.
    config.objective = objectives.preset("released", distance="l2", guidance=0.25)
    config.optimizer.update(
        name="adam", learning_rate=1.5e-3, clip_norm=1.0, warmup=50, decay_to=0.02
    )
    config.train.update(
        steps=10_000, ema_decay=0.999, unconditional="permuted", flow_matching_steps=2000,
        sample_every=1000, checkpoint_every=1000,
    )
    return config


def twinflow() -> ml_collections.ConfigDict:
    config = released()
    # Found by benchmarks/compare.py: docs/benchmarks.md, "A search of both methods".
    config.objective.update(ratios=(0.05, 0.45, 0.45, 0.05), rectify_weight=1.0)
    config.optimizer.learning_rate = 3e-3
    return config


def twin_meanflow() -> ml_collections.ConfigDict:
    config = released()
    config.objective = objectives.preset("twin_meanflow", guidance=0.25)
    return config

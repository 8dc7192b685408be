"""What a config file starts from: every section with its defaults."""

import dataclasses

import ml_collections

from twinflow_jax import objectives
from twinflow_jax.config.run import PARTS


def get() -> ml_collections.ConfigDict:
    """A locked config to change in a config file (`model` and `objective` whole, by assignment).

    `--help-config` says what each key means (docs/configs.md has them all).
    """
    return ml_collections.ConfigDict(
        {name: dataclasses.asdict(part()) for name, part in PARTS.items()}
        | {
            "pipeline": "", "objective": objectives.preset("released"),
            "model": {"name": "mlp", "sample_shape": (28, 28, 1), "num_classes": 10},
        },
        type_safe=False,  # the run's own keys say what they take, some a number or several
    ).lock()

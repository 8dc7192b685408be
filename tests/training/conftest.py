"""A run small enough for tests: real digits, a narrow network, a checkpoint every few steps."""

import pytest

from twinflow_jax import config as configs


@pytest.fixture
def small_config():
    """A function of overrides ("train.steps=4", ...) giving a run."""

    def make(*overrides: str):
        return configs.parse(
            "configs/digits.py",
            [
                "model.width=32", "model.depth=1", "data.batch_size=32", "train.steps=20",
                "train.log_every=1", "train.checkpoint_every=5", "train.sample_every=1000",
                "sample.score_count=0", "sample.columns=2", *overrides,
            ],
        )

    return make

"""A network that was trained on edits does what an instruction says to that very source."""

import dataclasses

import jax
import numpy as np
import pytest

from twinflow_jax import checkpoints, data
from twinflow_jax import config as configs
from twinflow_jax.sampling import few_step, sample
from twinflow_jax.training import inputs
from twinflow_jax.training.loop import train

SOURCES, CHANGES = 16, 3  # held out, and what is done to each


@pytest.mark.slow
def test_it_edits(tmp_path):
    """One and four evaluations on digits that training never saw. A drawn picture is right where
    the nearest of all changes of all sources is its own; not so with another source, nor with
    another instruction."""
    run = configs.parse("configs/emoji_edit.py:twinflow", [
        "pipeline=random", "data.name=digits", "data.records=()", "data.text_tokens=24",
        "model.sample_shape=(8,8,3)", "model.patch=2", "model.layers=3", "model.heads=4",
        "model.head_dim=16", "model.rope_axes=(4,6,6)", "model.text_width=48", "train.init_from=",
        "train.steps=2400", "train.flow_matching_steps=1200", "train.ema_decay=0.99",
        "train.sample_every=2400", "train.checkpoint_every=2400", "sample.steps=(1,)",
        "optimizer.learning_rate=2e-3",
    ])
    train(run, str(tmp_path), progress=False)
    _, model, params, _ = checkpoints.load_weights(tmp_path)
    digits = data.load("digits")
    held_out = dataclasses.replace(digits, train=digits.test)
    pipeline = inputs.open_pipeline(run, tmp_path)
    [[stream]] = inputs.of_edits(pipeline, held_out, run.data.text_tokens).streams
    rows = np.arange(SOURCES * CHANGES)
    batch = stream.read(rows, None)
    given, targets = batch["cond"], batch["x"].reshape(len(rows), -1)
    noise = np.random.default_rng(0).standard_normal(batch["x"].shape).astype(np.float32)

    def right(cond, evaluations: int) -> float:
        key = jax.random.key(0)
        drawn = sample(model.apply, params, noise, cond, few_step(evaluations), key)
        apart = np.asarray(drawn).reshape(len(rows), 1, -1) - targets
        return float((np.square(apart).sum(-1).argmin(1) == rows).mean())

    [sources] = given["references"]
    said = {name: given[name] for name in ("tokens", "mask")}
    other = given | {"references": (np.roll(sources, 7 * CHANGES, axis=0),)}
    mixed = given | {name: np.roll(array, 1, axis=0) for name, array in said.items()}
    for evaluations in (1, 4):
        shares = [right(cond, evaluations) for cond in (given, other, mixed)]
        print(evaluations, *shares)
        assert shares[0] >= 0.9 and max(shares[1:]) <= 0.1

"""Moments and weights in half their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twinflow_jax.config import Optimizer
from twinflow_jax.errors import UserError
from twinflow_jax.models.settings import DTYPES
from twinflow_jax.training import optimizers
from twinflow_jax.training.loop import train


def settings(**fields) -> Optimizer:
    return Optimizer(learning_rate=1e-2, **fields)


@pytest.mark.parametrize("name", ["adamw", "radam"])
def test_moments_in_bfloat16_go_the_same_way(name):
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=64), jnp.float32)
    ends = []
    for moments in DTYPES:
        optimizer = optimizers.create(settings(name=name, moments=moments), 300)
        weights = {"w": jnp.zeros(64)}
        state = optimizer.init(weights)
        kept = {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim}
        assert kept == {moments}

        @jax.jit
        def step(weights, state, optimizer=optimizer):
            gradient = jax.grad(lambda w: ((w["w"] - target) ** 2).sum())(weights)
            updates, state = optimizer.update(gradient, state, weights)
            return jax.tree.map(jnp.add, weights, updates), state

        for _ in range(300):
            weights, state = step(weights, state)
        ends.append(weights["w"])
    assert np.linalg.norm(ends[1] - ends[0]) <= 0.02 * np.linalg.norm(ends[0])


def test_stochastic_rounding_is_right_on_average():
    """Where rounding to nearest gives 1, a hundredth of a step of bfloat16 above 1 counts."""
    x = jnp.full(200_000, 1 + 2**-7 / 100, jnp.float32)
    rounded = optimizers.stochastic_round(jax.random.key(0), x).astype(jnp.float32)
    assert set(np.unique(rounded)) == {1.0, 1 + 2**-7}
    share = float((rounded > 1).mean())
    assert share == pytest.approx(0.01, abs=0.001)
    exact = jnp.asarray([0.0, -2.5, 1e30, -1e-30], jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(optimizers.stochastic_round(jax.random.key(1), exact), exact)


def test_bfloat16_weights_train(small_config, tmp_path):
    """Small updates add up, and averages keep all digits."""
    overrides = [
        "train.weights=bfloat16", "optimizer.moments=bfloat16", "optimizer.betas=(0.9, 0.99)",
        "train.ema_decay=0.9",
    ]
    whole = train(small_config(*overrides), str(tmp_path / "whole"), progress=False)
    dtypes = lambda tree: {leaf.dtype.name for leaf in jax.tree.leaves(tree)}
    assert dtypes(whole.params) == {"bfloat16"} and dtypes(whole.average.params) == {"float32"}
    exact = train(small_config(*overrides[2:]), str(tmp_path / "exact"), progress=False)
    for half, full in zip(*map(jax.tree.leaves, (whole.params, exact.params)), strict=True):
        error = np.linalg.norm(np.asarray(half, np.float32) - np.asarray(full))
        assert error <= 0.02 * np.linalg.norm(full) + 0.01


def test_dtypes_that_are_none(small_config, tmp_path):
    with pytest.raises(UserError, match="optimizer.moments is 'half'"):
        optimizers.create(settings(moments="half"), 1)
    with pytest.raises(UserError, match="train.weights is 'half'"):
        train(small_config("train.weights=half"), str(tmp_path / "run"), progress=False)

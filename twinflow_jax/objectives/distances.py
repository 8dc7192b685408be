"""Distances between a prediction and its target: one number per row, in float32."""

import functools

import jax
import jax.numpy as jnp

from twinflow_jax.arrays import Losses, Samples


def l2(prediction: Samples, target: Samples) -> Losses:
    """Mean squared difference of each row."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(jnp.square(difference), axis=tuple(range(1, difference.ndim)))


def barron(
    prediction: Samples, target: Samples, alpha: float = 1.0, scale: float = 1e-3
) -> Losses:
    """Mean squared difference, reweighted per row by Barron's robust kernel.

    The weight `((mse / (scale^2 + 1e-8)) / |alpha - 2| + 1)^((alpha - 2) / 2) / scale` carries
    no gradient, so at alpha = 1 every row's gradient has nearly the same norm, however far it
    is from its target; alpha = 2 leaves plain L2 (over scale).
    Source: `barron_reweighting_loss` of the released src/methodes/twinflow/twinflow.py.
    """
    mse = l2(prediction, target)
    if abs(alpha - 2.0) < 1e-5:
        return mse / scale
    normalised = mse / (scale**2 + 1e-8)
    weight = (normalised / abs(alpha - 2.0) + 1.0) ** ((alpha - 2.0) / 2.0)
    return mse * jax.lax.stop_gradient(weight) / scale


DISTANCES = {"l2": lambda alpha, scale: l2, "barron": lambda alpha, scale: functools.partial(
    barron, alpha=alpha, scale=scale
)}

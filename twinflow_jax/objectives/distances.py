"""Distances between a prediction and its target: one number per row, in float32."""

import jax
import jax.numpy as jnp

from twinflow_jax.arrays import Losses, Samples
from twinflow_jax.errors import UserError


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


def distance(name: str, alpha: float = 1.0, scale: float = 1e-3):
    """The distance called `name` ("l2" or "barron") as a function of (prediction, target).

    Raises:
      UserError: another name, or a scale that is not above 0.
    """
    if not scale > 0:
        raise UserError(f"objective.barron_scale is {scale}; it lies above 0 (released: 0.001)")
    if name == "l2":
        return l2
    if name == "barron":
        return lambda prediction, target: barron(prediction, target, alpha, scale)
    raise UserError(f"objective.distance is {name!r}; choose 'l2' or 'barron'")

"""Projections to heads and their rotation, in the order that attention on a TPU takes: heads, then
places, so that nothing is turned around afterwards."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.arrays import AnyArray
from twinflow_jax.models.adapters import low_rank


class HeadProjection(nn.Module):
    """A dense layer whose outputs are heads, one after the other.

    config: has width, heads, head_dim and dtype.
    """

    config: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, h: Float[Array, "B S D"]) -> Float[Array, "B heads S E"]:
        c = self.config
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "heads")),
            (c.width, c.width),
        )
        h, kernel = h.astype(c.dtype), kernel.astype(c.dtype)
        heads = kernel.reshape(c.width, c.heads, c.head_dim)
        out = jnp.einsum("bsw,wnd->bnsd", h, heads)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
            bias = self.param("bias", zeros, (c.width,)).astype(c.dtype)
            out = out + bias.reshape(1, c.heads, 1, c.head_dim)
        more = low_rank(self, h, (c.width, c.width), c.dtype)
        if more is None:
            return out
        return out + jnp.swapaxes(more.reshape(*h.shape[:2], c.heads, c.head_dim), 1, 2)


def axes_problems(axes: tuple[int, int, int], head_dim: int) -> list[str]:
    """What keeps a head's channels from being rotated by so many of each of three axes."""
    if sum(axes) == head_dim and not any(axis % 2 for axis in axes):
        return []
    return [f"rope_axes {axes} must be three even numbers that add up to head_dim {head_dim}"]


def rotate(
    x: Float[Array, "B heads S D"], cos: Float[AnyArray, "#B S half"],
    sin: Float[AnyArray, "#B S half"],
) -> Float[Array, "B heads S D"]:
    """Rotates pairs of channels, each of a head's first half with its fellow of the second."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)

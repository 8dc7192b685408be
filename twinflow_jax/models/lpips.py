"""LPIPS (1801.03924), version 0.1: how different two pictures look, by a network's features.

AlexNet or VGG-16 up to their last features, and a weight of each channel of five of their layers.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twinflow_jax.arrays import Images
from twinflow_jax.models import names

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the released networks' inputs
TINY = 1e-10  # beside a norm that may be 0


@dataclasses.dataclass(frozen=True)
class Config:
    """layers: (channels, window, stride, padding, pool before it, whether its output is compared)
    of each convolution; a pool is (window, stride), or None."""

    layers: tuple[tuple[int, int, int, int, tuple[int, int] | None, bool], ...]


ALEX = Config((
    (64, 11, 4, 2, None, True), (192, 5, 1, 2, (3, 2), True), (384, 3, 1, 1, (3, 2), True),
    (256, 3, 1, 1, None, True), (256, 3, 1, 1, None, True),
))
VGG = Config(tuple(
    (channels, 3, 1, 1, (2, 2) if block and not number else None, number == count - 1)
    for block, (channels, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)))
    for number in range(count)
))
NETWORKS = {"alex": ALEX, "vgg": VGG}


class Features(nn.Module):
    """Images in [-1, 1] -> what is compared, each channel's square weighted: the squared distance
    of two of them, summed over channels and averaged over places, is a layer's part of LPIPS."""

    config: Config

    @nn.compact
    def __call__(self, x: Images) -> list[Float[Array, "B _ _ _"]]:
        expand = lambda values: jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3)
        h, found = (x - expand(SHIFT)) / expand(SCALE), []
        for i, (channels, window, stride, padding, pool, compared) in enumerate(self.config.layers):
            if pool:
                h = nn.max_pool(h, (pool[0],) * 2, (pool[1],) * 2)
            h = nn.relu(nn.Conv(
                channels, (window,) * 2, stride, padding, name=f"convolution_{i}"
            )(h))
            if compared:
                weight = self.param(f"weight_{len(found)}", nn.initializers.ones, (channels,))
                norm = jnp.sqrt(jnp.sum(h**2, -1, keepdims=True)) + TINY
                weight = jnp.sqrt(jax.lax.broadcast_to_rank(weight, h.ndim))
                found.append(h / norm * weight)
        return found


def distances(
    config: Config, params, x: Float[Array, "P K H W 3"]
) -> Float[Array, "P pairs"]:
    """LPIPS of all pairs of K images in each of P groups; images in [-1, 1]."""
    groups, count = x.shape[:2]
    found = Features(config).apply({"params": params}, x.reshape(-1, *x.shape[2:]))
    first, second = np.triu_indices(count, 1)
    total = jnp.zeros((groups, len(first)))
    for layer in found:
        layer = layer.reshape(groups, count, *layer.shape[1:])
        for pair, (a, b) in enumerate(zip(first, second, strict=True)):
            part = jnp.mean(jnp.sum((layer[:, a] - layer[:, b]) ** 2, -1), (1, 2))
            total = total.at[:, pair].add(part)
    return total


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Of the parameters, by path."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
    made = jax.eval_shape(Features(config).init, jax.random.key(0), image)["params"]
    return {path: leaf.shape for path, leaf in names.flatten(made).items()}

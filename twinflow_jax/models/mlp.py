"""Residual multilayer perceptrons on flattened samples: points, digits.

All output `x - net(...)`, as the tutorial's network does: at the start of training the
network's data prediction at t = 1 is then its own output instead of noise minus something.
At other times too where the network estimates the picture: noise, which fills a sample, then need
not pass through the width.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp

from twinflow_jax.arrays import Samples, Times, Velocities
from twinflow_jax.keys import option
from twinflow_jax.models import conditioning
from twinflow_jax.models.projections import Dense
from twinflow_jax.models.settings import Settings

# What an estimated picture is divided by at least. Less blows up the errors at small times, which
# the network then spends itself on: one evaluation gets worse (docs/benchmarks.md).
LEAST_OF_PICTURE = 0.6
# And x_t: the last step of every recommended grid of few steps begins there or before, and leaves
# no noise in the picture.
LEAST_OF_NOISE = 0.5


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Samples of any rank."""

    name: str = "mlp"
    sample_shape: tuple[int, ...] = (2,)
    width: int = option(256, "of the hidden layers", least=1)
    depth: int = option(3, "residual blocks", least=0)
    times: str = option(
        "raw",
        "raw: t and r as scalars through separate embeddings that add (the tutorial's kind); "
        "sinusoid: features of t and t - r modulate every block",
        choices=("raw", "sinusoid"),
    )
    estimates: str = option(
        "offset",
        "what the last layer gives. offset: x_t less the velocity (the tutorial's kind); picture: "
        "the sample itself, however much noise there is",
        choices=("offset", "picture"),
    )


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x_t: Samples, t: Times, r: Times, cond: dict) -> Velocities:
        c = self.config
        flat = x_t.reshape(x_t.shape[0], -1)
        width = c.width if c.times == "raw" else c.width // 4  # of the context
        label = conditioning.Condition(width, c.num_classes)(cond, flat.shape[0])
        h = Dense(c.width)(flat)
        if c.times == "raw":
            times = conditioning.RawTime(width)(t) + conditioning.RawTime(width)(r)
            context = nn.relu(times + label)
            for _ in range(c.depth):
                inner = nn.relu(Dense(c.width)(nn.relu(h)) + Dense(c.width)(context))
                h = h + Dense(c.width)(inner)
        else:
            times = conditioning.SinusoidTime(width)(t) + conditioning.SinusoidTime(width)(t - r)
            context = nn.silu(times + label)
            for _ in range(c.depth):
                shift, scale, gate = jnp.split(Dense(3 * c.width)(context), 3, axis=-1)
                inner = nn.LayerNorm(use_bias=False, use_scale=False)(h) * (1 + scale) + shift
                inner = Dense(c.width)(nn.silu(Dense(c.width)(inner)))
                h = h + gate * inner
            h = nn.LayerNorm()(h)
        out = Dense(math.prod(c.sample_shape))(nn.silu(h))
        out = out.reshape(x_t.shape)
        if c.estimates == "offset":
            return x_t - out
        time = jnp.abs(t).reshape(-1, *(1,) * (x_t.ndim - 1))
        return x_t / jnp.maximum(time, LEAST_OF_NOISE) - out / jnp.maximum(time, LEAST_OF_PICTURE)

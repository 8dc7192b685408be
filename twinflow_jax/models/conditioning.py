"""How networks see their times and the small ones their condition.

`cond` is a dict: {"label": (B,) int32} for classes, where label num_classes stands for no
class; {"tokens": (B, L, D), "mask": (B, L)} for text, and "references", a tuple of latents
(B, h, w, C), for edits; {} for unconditional networks.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twinflow_jax.arrays import Times
from twinflow_jax.models import names
from twinflow_jax.models.projections import UNIT_VARIANCE, Dense, dense

SINUSOID_WIDTH = 256
TWIN = "twin_time_embedder"  # the path of what sees that t is of the twin, where times have no sign


@dataclasses.dataclass(frozen=True)
class TimeConditioning:
    """How a network sees its times: E1(first(t, r)) + weight(t, r) E2(r).

    second: the path of E2, "" where there is none; suffix: of its published name, beside E1's.
    last: initialises its last kernel. note: for those who load exported weights elsewhere.
    """

    second: str = ""
    suffix: str = ""
    first: Callable[[Times, Times], Times] = lambda t, r: t
    weight: Callable[[Times, Times], Times] = lambda t, r: t - r
    last: Callable | None = None
    note: str = ""


NOTE = """\
The transformer was trained with two times, the present t and the target r: its time embedding is
{}. One- and few-step sampling tells the network r = 0, where that is E1(t), as
diffusers' own class computes it. Sampling in many steps, of r = t, needs twinflow_jax."""

# second_embedder: TwinFlow's full training; at r = t it is the base network. half_r: its LoRA
# training; at r = 0 it is. gated: ours; so it is at r = 0, and at first everywhere.
TIMES = {
    "second_embedder": TimeConditioning("second_time_embedder", "_2"),
    "half_r": TimeConditioning(
        first=lambda t, r: t - r / 2, note=NOTE.format("E1(t - r/2)")
    ),
    "gated": TimeConditioning(
        "gated_time_embedder", "_gated", weight=lambda t, r: r, last=nn.initializers.zeros,
        note=NOTE.format("E1(t) + r E2(r), with E2 under keys that are new (`*_gated.*`)"),
    ),
}


def sinusoid(values: Float[Array, "B"], scale: float = 1.0) -> Float[Array, "B 256"]:
    """Cosines, then sines, of scale * values at frequencies from 1 down to almost 1/10000.

    In float32 and in this order of operations as in diffusers' Timesteps: at angles of up to
    1000 another rounding already shows.
    """
    half = SINUSOID_WIDTH // 2
    exponents = np.float32(-math.log(10_000.0)) * np.arange(half, dtype=np.float32)
    angles = scale * (values[:, None] * np.exp(exponents / np.float32(half))[None])
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Embedder(nn.Module):
    """A vector through an MLP to the model's width.

    config: has width and dtype. kernel: an initialiser, last: that of the last kernel, where it is
    another one. widths: hidden, and of what comes out, where they are others.
    """

    config: Any
    kernel: Callable = UNIT_VARIANCE
    last: Callable | None = None
    widths: tuple[int, int] = ()

    def setup(self):
        hidden, out = self.widths or (self.config.width,) * 2
        self.hidden = dense(self.config, hidden, (None, None), kernel=self.kernel)
        self.out = dense(self.config, out, ("embed", None), kernel=self.last or self.kernel)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        return self.out(nn.silu(self.hidden(x)))


class SinusoidEmbedder(Embedder):
    """The same of the sinusoid of a number. scale: that the number is multiplied by."""

    scale: float = 1.0

    def __call__(self, values: Float[Array, "B"]) -> Float[Array, "B E"]:
        return super().__call__(sinusoid(values, self.scale))


def embedder_names(key: str, path: str) -> tuple[tuple[str, str, str], ...]:
    """(key, path, layout) of its tensors, as diffusers' TimestepEmbedding has them."""
    return names.linear(f"{key}.linear_1", f"{path}/hidden") + names.linear(
        f"{key}.linear_2", f"{path}/out"
    )


class RawTime(nn.Module):
    """A scalar time through a small MLP of its own, as in the tutorial's networks."""

    width: int

    @nn.compact
    def __call__(self, t: Times) -> Float[Array, "B {self.width}"]:
        hidden = nn.relu(Dense(self.width)(t[:, None]))
        return Dense(self.width)(hidden)


class SinusoidTime(nn.Module):
    """A time through smooth low-frequency features and an MLP.

    The time itself and its sine and cosine at frequencies pi/2 and pi: slow features, because
    training divides differences over dt = 0.01 by dt, which makes fast ones costly to fit.
    last: initialises the last kernel.
    """

    width: int
    last: Callable = UNIT_VARIANCE

    @nn.compact
    def __call__(self, t: Times) -> Float[Array, "B {self.width}"]:
        angles = t[:, None] * (jnp.pi / 2) * jnp.arange(1, 3)[None]
        features = jnp.concatenate([t[:, None], jnp.cos(angles), jnp.sin(angles)], axis=-1)
        hidden = nn.silu(Dense(self.width)(features))
        return Dense(self.width, kernel_init=self.last)(hidden)


class Condition(nn.Module):
    """One vector (B, width) for the condition: a class embedding, or the mean text token."""

    width: int
    num_classes: int

    @nn.compact
    def __call__(self, cond: dict, rows: int) -> Float[Array, "{rows} {self.width}"]:
        if "label" in cond:
            return nn.Embed(self.num_classes + 1, self.width)(cond["label"])
        if "tokens" in cond:
            mask = cond["mask"][..., None].astype(jnp.float32)
            mean = (cond["tokens"] * mask).sum(1) / jnp.maximum(mask.sum(1), 1.0)
            return Dense(self.width)(mean)
        return jnp.zeros((rows, self.width), jnp.float32)

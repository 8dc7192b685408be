"""A small diffusion transformer with stacked, scanned layers.

Patches attend to each other and, where there is any, to the text, whose tokens are further keys
and values in every block: layers do not change them, so that text costs little. Times and the
class (or mean text token) modulate every block (AdaLN-zero). Layers are one set of parameters
with a leading `layers` axis, so that compile time does not grow with depth.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from twinflow_jax.arrays import Lengths, Maps, TextTokens, Times
from twinflow_jax.errors import UserError
from twinflow_jax.keys import option
from twinflow_jax.models import axes, conditioning, patches
from twinflow_jax.models.adapters import adapted
from twinflow_jax.models.attention import attention
from twinflow_jax.models.axes import init_of
from twinflow_jax.models.projections import UNIT_VARIANCE, Dense
from twinflow_jax.models.settings import LayeredSettings
from twinflow_jax.models.stack import run_layers

SMALLEST_TIME = 0.3  # that the output is divided by


@dataclasses.dataclass(frozen=True)
class Config(LayeredSettings):
    """Images whose height and width divide by patch."""

    name: str = "dit"
    sample_shape: tuple[int, ...] = (28, 28, 1)
    num_classes: int = 10
    patch: int = option(4, "pixels a token covers along each side", least=1)
    width: int = option(96, "of the layers", least=1)
    depth: int = option(4, "layers", least=1)
    heads: int = option(4, "of attention", least=1)

    def __post_init__(self):
        super().__post_init__()
        shape = self.sample_shape
        if len(shape) != 3 or shape[0] % self.patch or shape[1] % self.patch:
            raise UserError(
                f"model {self.name!r} with patch {self.patch} cannot take samples of shape "
                f"{shape}: height and width must divide by model.patch"
            )
        if self.width % (4 * self.heads):
            raise UserError(
                f"model.width {self.width} must divide by 4 and by model.heads {self.heads}"
            )


def position_features(
    height: int, width: int, channels: int
) -> Float[Array, "{height}*{width} {channels}"]:
    """Fixed 2-D sine and cosine features: half the channels for rows, half for columns."""
    def axis(n):
        frequencies = 1.0 / 100.0 ** (jnp.arange(channels // 4)[None] / (channels // 4))
        angles = jnp.arange(n)[:, None] * frequencies
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    rows = jnp.repeat(axis(height), width, axis=0)
    columns = jnp.tile(axis(width), (height, 1))
    return jnp.concatenate([rows, columns], axis=-1)


def _dense(config: Config, features: int, axes: tuple[str, str], kernel=UNIT_VARIANCE) -> Dense:
    """A projection whose kernel has these logical axes; its bias is whole."""
    return Dense(features, dtype=config.dtype, kernel_init=init_of(kernel, *axes))


class Projection(nn.Module):
    """A dense layer over the last `contracted` axes, to or from heads.

    shape: of its kernel. axes: the kernel's logical ones.
    """

    shape: tuple[int, ...]
    contracted: int
    axes: tuple[str | None, ...]
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        count, places = self.contracted, range(len(self.shape))
        normal = nn.initializers.lecun_normal(in_axis=places[:count], out_axis=places[count:])
        kernel = self.param("kernel", init_of(normal, *self.axes), self.shape)
        bias = self.param("bias", nn.initializers.zeros, self.shape[count:])
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        out = jnp.tensordot(x, kernel, count)
        out += lax.broadcast_to_rank(bias, out.ndim)
        return adapted(self, out, x, self.shape, count)


class Attention(nn.Module):
    """Patches attend to each other and to the text, `lengths` of whose tokens count."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], text: TextTokens | None,
        lengths: Lengths | None,
    ) -> Float[Array, "B S D"]:
        c = self.config
        heads = (c.heads, c.width // c.heads)
        seen = x
        if text is not None:
            seen, lengths = jnp.concatenate([x, text], axis=1), x.shape[1] + lengths
        parts = [
            Projection((c.width, *heads), 1, ("embed", "heads", None), c.dtype, name=name)(tokens)
            for name, tokens in (("query", x), ("key", seen), ("value", seen))
        ]
        attended = checkpoint_name(attention(*parts, lengths), "attention_output")
        out = Projection((*heads, c.width), 2, ("heads", None, "embed"), c.dtype, name="out")
        return out(attended)


class Block(nn.Module):
    """Attention and feed-forward, both modulated; `(h, ...) -> (h, None)`."""

    config: Config

    @nn.compact
    def __call__(
        self, h: Float[Array, "B S D"], context: Float[Array, "B D"],
        text: TextTokens | None, lengths: Lengths | None,
    ):
        c = self.config
        h = checkpoint_name(axes.rows(h), "block_input")
        norm = nn.LayerNorm(use_bias=False, use_scale=False, dtype=c.dtype)
        modulation = _dense(c, 6 * c.width, ("embed", "modulation"), nn.initializers.zeros)(context)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(
            modulation[:, None], 6, axis=-1
        )
        # Flax's name, so that weights of earlier versions are found.
        attended = Attention(c, name="MultiHeadDotProductAttention_0")(
            norm(h) * (1 + scale_1) + shift_1, text, lengths
        )
        h = h + gate_1 * attended
        inner = norm(h) * (1 + scale_2) + shift_2
        inner = nn.gelu(_dense(c, 4 * c.width, ("embed", "mlp"))(inner))
        return h + gate_2 * _dense(c, c.width, ("mlp", "embed"))(inner), None


class DiT(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x_t: Maps, t: Times, r: Times, cond: dict) -> Maps:
        c = self.config
        rows, height, width, channels = x_t.shape
        p, grid = c.patch, (height // c.patch, width // c.patch)
        h = Dense(c.width, dtype=c.dtype)(patches.pack(x_t, p))
        h = h + position_features(*grid, c.width).astype(c.dtype)[None]

        # Where the second one is not to see r it still says what it does at r = t: what was
        # trained there alone, on velocities, is then the base of every conditioning.
        interval = t - r if c.time_conditioning == "second_embedder" else jnp.zeros_like(t)
        embedder = functools.partial(conditioning.SinusoidTime, c.width)
        times = embedder()(c.times.first(t, r)) + embedder()(interval)
        if c.times.last:
            gated = embedder(c.times.last, name=c.times.second)
            times += c.times.weight(t, r)[:, None] * gated(r)
        context = times + conditioning.Condition(c.width, c.num_classes)(cond, rows)
        text = lengths = None
        if "tokens" in cond:
            # Normalised, as patches are before attention: both share its projections.
            text = Dense(c.width, dtype=c.dtype, name="text")(cond["tokens"])
            text = nn.LayerNorm(dtype=c.dtype, name="text_norm")(text)
            lengths = cond["mask"].sum(axis=-1)

        h = run_layers(self, Block, c.depth, c.remat, h, per_row=(nn.silu(context), text, lengths))
        h = nn.LayerNorm(dtype=c.dtype)(h)
        out = Dense(p * p * channels, dtype=c.dtype, kernel_init=nn.initializers.zeros)(h)
        return velocity_to(patches.unpack(out, grid, p), x_t, t)


def velocity_to(picture: Maps, x_t: Maps, t: Times) -> Maps:
    """The velocity of an estimate of the picture.

    Noise, which fills a patch, then need not pass through the width. Bounded, since a small t
    would blow up the estimate's error.
    """
    return (x_t - picture) / jnp.maximum(jnp.abs(t), SMALLEST_TIME)[:, None, None, None]

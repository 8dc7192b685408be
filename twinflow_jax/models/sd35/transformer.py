"""Stable Diffusion 3's transformer: blocks of two streams, image patches and text tokens (MMDiT).

The same function as diffusers' SD3Transformer2DModel, with TwinFlow's second time: the modulation
starts from E1(t, pooled) + (t - r) E2(r, pooled), or sees r otherwise (`conditioning.TIMES`). Three
kinds of blocks follow each other: the first ones of 3.5 Medium have a second attention, of the
image alone (MMDiT-X); after the last one the text goes nowhere, so that of its text only keys,
values and queries are there.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from twinflow_jax.arrays import Lengths, Maps, TextTokens, Times
from twinflow_jax.errors import UserError
from twinflow_jax.keys import option
from twinflow_jax.models import names, patches, settings
from twinflow_jax.models.axes import init_of, tokens
from twinflow_jax.models.conditioning import Embedder, SinusoidEmbedder, embedder_names
from twinflow_jax.models.projections import UNIT_VARIANCE, dense
from twinflow_jax.models.settings import TextSettings
from twinflow_jax.models.stack import run_layers
from twinflow_jax.models.streams import TEXT, Modulation, Stream, attend, modulated, stream_names

CLASS = "SD3Transformer2DModel"
# Keys of config.json: our field and the published class's default.
_FIELDS = {
    "num_layers": ("layers", 18),
    "num_attention_heads": ("heads", 18),
    "attention_head_dim": ("head_dim", 64),
    "in_channels": ("latent_channels", 16),
    "patch_size": ("patch", 2),
    "joint_attention_dim": ("text_width", 4096),
    "pooled_projection_dim": ("pooled_width", 2048),
    "pos_embed_max_size": ("positions", 96),
    "dual_attention_layers": ("dual_layers", ()),
    "sample_size": ("side", 128),
}
_OTHERS = ("caption_projection_dim", "out_channels", "qk_norm")
TIME_SCALE = 1000.0
DUAL, PLAIN, LAST = (9, 6), (6, 6), (6, 2)  # terms of a block's image and text modulation


class Group(NamedTuple):
    """Blocks of one kind, stacked under a name. first: the number of the first. terms: of their
    modulation, which say the kind."""

    name: str
    first: int
    layers: int
    terms: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Config(TextSettings):
    """3.5 Medium's."""

    name: str = "sd35"
    sample_shape: tuple[int, ...] = (128, 128, 16)
    layers: int = option(24, "of the transformer", least=1)
    dual_layers: int = option(
        13, "of these, the first ones, with a second attention of the image alone", least=0
    )
    heads: int = option(24, "of attention", least=1)
    head_dim: int = option(64, "channels of a head", least=1)
    qk_norm: bool = option(True, "whether each head's query and key are normalised")
    latent_channels: int = option(16, "of the autoencoder", least=1)
    patch: int = option(2, "latents a token covers along each side", least=1)
    text_width: int = option(4096, "of the text tokens", least=1)
    pooled_width: int = option(
        2048, "of the vector of the whole text, in the first token", least=1
    )
    positions: int = option(
        384, "rows, and columns, of the table of positions: most tokens of a side", least=1
    )

    splits_tokens = True

    def problems(self) -> list[str]:
        found = super().problems()
        if self.dual_layers >= self.layers:
            found.append(
                f"dual_layers {self.dual_layers} must be less than layers {self.layers}"
            )
        if max(self.sample_shape[:2]) > self.positions * self.patch:
            found.append(
                f"sample_shape {self.sample_shape} is larger than {self.positions} positions"
            )
        if self.pooled_width > self.text_width:
            found.append(
                f"pooled_width {self.pooled_width} is more than text_width {self.text_width}"
            )
        return found

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def groups(self) -> tuple[Group, ...]:
        """All blocks, in order."""
        last, dual = self.layers - 1, self.dual_layers
        every = (
            Group("dual", 0, dual, DUAL), Group("layers", dual, last - dual, PLAIN),
            Group("last", last, 1, LAST),
        )
        return tuple(group for group in every if group.layers)

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """As `family.PublishedConfig` says."""
        values, mistyped, problems = settings.published(
            config, _FIELDS, {"_class_name": CLASS}, _OTHERS
        )
        dual, side, channels = (
            values.pop("dual_layers"), values.pop("side"), values["latent_channels"]
        )
        width = values["heads"] * values["head_dim"] if not mistyped else 0
        if dual != tuple(range(len(dual))):
            problems.append(f"dual_attention_layers {list(dual)} are not the first ones")
        if not mistyped and config.get("caption_projection_dim", 1152) != width:
            problems.append(f"caption_projection_dim is not that of the heads together, {width}")
        if config.get("out_channels", 16) not in (channels, None):
            problems.append("out_channels is not in_channels")
        if config.get("qk_norm") not in ("rms_norm", None):
            problems.append(f"qk_norm is {config['qk_norm']!r}, not 'rms_norm' or null")
        settings.refuse("config.json of the transformer", problems + mistyped)
        return cls(
            **values, dual_layers=len(dual), qk_norm=config.get("qk_norm") is not None,
            sample_shape=(side, side, channels),
        )


class TimeAndText(nn.Module):
    """A time and the vector of the whole text, each through an MLP: their sum, float32.

    kernel, last: as of the embedders of both.
    """

    config: Config
    kernel: Callable = UNIT_VARIANCE
    last: Callable | None = None

    def setup(self):
        self.time = SinusoidEmbedder(self.config, self.kernel, self.last)
        self.text = Embedder(self.config, self.kernel, self.last)

    def __call__(self, t: Times, pooled: Float[Array, "B P"]) -> Float[Array, "B D"]:
        return (self.time(TIME_SCALE * t) + self.text(pooled)).astype(jnp.float32)


class Block(nn.Module):
    """`(streams, ...) -> (streams, None)`; streams = (image, text).

    How many terms the modulations have says which kind it is, and which of its parts have weights.
    """

    config: Config

    def setup(self):
        stream = lambda: Stream(self.config, self.config.qk_norm)
        self.image, self.text, self.second = stream(), stream(), stream()

    def __call__(
        self, streams: tuple[Float[Array, "B S D"], TextTokens],
        image_modulation: Float[Array, "B 1 I"], text_modulation: Float[Array, "B 1 T"],
        lengths: Lengths,
    ):
        image, text = (checkpoint_name(tokens(h), "block_input") for h in streams)
        first, then = (
            jnp.split(m, m.shape[-1] // self.config.width, axis=-1)
            for m in (image_modulation, text_modulation)
        )
        kind = len(first), len(then)
        # At the end of the network scale comes before shift.
        of_text = then[::-1] if kind == LAST else then[:2]
        attended = attend(
            (self.image.heads(image, *first[:2]), self.text.heads(text, *of_text)), lengths
        )
        before, count = image, image.shape[1]
        if kind == DUAL:
            *shifted, gate = first[6:]
            alone = attend((self.second.heads(before, *shifted),), None)
            image = image + gate * self.second.out(alone)
        image = self.image.update(image, attended[:, :count], *first[2:6])
        if kind != LAST:
            text = self.text.update(text, attended[:, count:], *then[2:])
        return (tokens(image), tokens(text)), None


class Transformer(nn.Module):
    """Velocity of latents under text.

    `(x_t (B, H, W, C), t (B,), r (B,), cond) -> (B, H, W, C)`, float32; H and W are multiples
    of the patch, t and r are in [-1, 1]. cond: {"tokens": (B, L, text_width), "mask": (B, L),
    true at each row's valid tokens, which come before its padding}; the first token has the vector
    of the whole text in its first channels. Rows do not depend on L.

    Raises:
      UserError: latents whose sides are no multiples of the patch, or have more tokens than the
        table of positions has rows.
    """

    config: Config

    @nn.compact
    def __call__(self, x_t: Maps, t: Times, r: Times, cond: dict) -> Maps:
        c, times = self.config, self.config.times
        grid = patches.grid(x_t, c.patch)
        sides, square = (c.patch, c.patch), (c.positions, c.positions)
        image = nn.Conv(
            c.width, sides, sides, "VALID", dtype=c.dtype, name="image_in",
            kernel_init=init_of(UNIT_VARIANCE, *(None,) * 4),
            bias_init=init_of(nn.initializers.zeros, None),
        )(x_t).reshape(len(x_t), -1, c.width)
        table = self.param(
            "positions", init_of(nn.initializers.normal(1.0), None, None, "embed"),
            (1, c.positions**2, c.width),
        )
        top, left = ((c.positions - side) // 2 for side in grid)  # from its middle
        if min(top, left) < 0:
            raise UserError(
                f"latents of {x_t.shape[1]}x{x_t.shape[2]} have more tokens along a side than the "
                f"{c.positions} positions: draw smaller"
            )
        places = table.reshape(1, *square, c.width)
        places = places[:, top : top + grid[0], left : left + grid[1]].reshape(1, -1, c.width)
        image = (image.astype(jnp.float32) + places).astype(c.dtype)

        given, valid = cond["tokens"], cond["mask"].astype(jnp.int32).sum(1)
        pooled = given[:, 0, : c.pooled_width]
        text = dense(c, c.width, ("text", None), "text_in")(given[:, 1:])
        lengths = image.shape[1] + jnp.maximum(valid - 1, 0)

        context = TimeAndText(c, name="time_embedder")(times.first(t, r), pooled)
        if times.second:
            normal = nn.initializers.normal(0.02)
            second = TimeAndText(c, normal, times.last, name=times.second)(r, pooled)
            context += times.weight(t, r)[:, None] * second
        context = nn.silu(context)[:, None]

        streams = image, text
        for name, _, layers, terms in c.groups:
            modulation = Modulation(c, layers, terms, name=f"{name}_modulation")
            streams = run_layers(
                self, Block, layers, c.remat, streams, per_layer=modulation(context, context),
                per_row=(lengths,), name=name,
            )

        zeros, channels = nn.initializers.zeros, c.latent_channels * c.patch**2
        final = dense(c, 2 * c.width, ("embed", "modulation"), "final_modulation", kernel=zeros)
        scale, shift = jnp.split(final(context), 2, axis=-1)
        out = dense(c, channels, ("embed", None), "out", kernel=zeros)
        velocity = out(modulated(streams[0], shift, scale)).astype(jnp.float32)
        return patches.unpack(velocity, grid, c.patch)


def _embedder(key: str, path: str) -> tuple[tuple[str, str, str], ...]:
    return (
        *embedder_names(f"{key}.timestep_embedder", f"{path}/time"),
        *embedder_names(f"{key}.text_embedder", f"{path}/text"),
    )


def _group(config: Config, group: Group) -> tuple[names.Rule, ...]:
    """Of the tensors of its blocks."""
    dual, last, norm = group.terms == DUAL, group.terms == LAST, config.qk_norm
    modulation = (
        *names.linear("norm1.linear", "image"), *names.linear("norm1_context.linear", "text"),
    )
    block = (
        *stream_names("image", "ff", qk_norm=norm),
        *stream_names("text", "" if last else "ff_context", TEXT, qk_norm=norm, goes_on=not last),
        *(stream_names("second", "", attention="attn2", qk_norm=norm) if dual else ()),
    )
    of = "transformer_blocks"
    return (
        *names.stack(of, modulation, f"{group.name}_modulation", group.layers, group.first),
        *names.stack(of, block, group.name, group.layers, group.first),
    )


def table(config: Config) -> names.NameTable:
    """The published tensors' names; TwinFlow's second embedder, if missing, starts at random."""
    times, name = config.times, "time_text_embed"
    single = (
        ("pos_embed.pos_embed", "positions", "same"),
        ("pos_embed.proj.weight", "image_in/kernel", "conv"),
        ("pos_embed.proj.bias", "image_in/bias", "same"),
        *_embedder(name, "time_embedder"),
        *names.linear("context_embedder", "text_in"),
        *names.linear("norm_out.linear", "final_modulation"),
        *names.linear("proj_out", "out"),
    )
    normal = lambda key: 0.02 if key.endswith("weight") else 0.0
    start = lambda key: {} if times.last else {"normal": normal(key), "group": names.KNOWS_R}
    second = _embedder(f"{name}{times.suffix}", times.second) if times.second else ()
    return names.NameTable(
        rules=(
            *(names.Rule(*rule) for rule in single),
            *(names.Rule(*rule, **start(rule[0])) for rule in second),
            *(rule for group in config.groups for rule in _group(config, group)),
        ),
        prefixes=names.TRAINERS,
    )

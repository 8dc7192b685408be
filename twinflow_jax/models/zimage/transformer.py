"""The Z-Image transformer: one stream of image patches and text tokens, after refiners of each.

The same function as diffusers' ZImageTransformer2DModel, with TwinFlow's second time. The network
counts times from noise to data and knows no sign; with u and v for t and r, counted so and with
their signs, its time embedding is

    E1(|u|) + |v - u| E2(v - u) + E3(|u|) where t < 0

(`conditioning.TIMES` has other ways to see r). E1 and E2 are TwinFlow's, whose released
checkpoint tells t and -t, r = t, as the same: E3, new here, tells the twin apart. E2 and E3 are
zero at first, where the network is the base at all times, and E3 is of the twin alone.
"""

import dataclasses
from collections.abc import Collection

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from twinflow_jax.arrays import AnyArray, Lengths, Maps, Times
from twinflow_jax.keys import option
from twinflow_jax.models import decoder, names, patches, settings
from twinflow_jax.models.attention import attention
from twinflow_jax.models.axes import init_of, tokens
from twinflow_jax.models.conditioning import TWIN, SinusoidEmbedder
from twinflow_jax.models.heads import HeadProjection, axes_problems, rotate
from twinflow_jax.models.projections import dense, rms_norm
from twinflow_jax.models.settings import TextSettings
from twinflow_jax.models.stack import run_layers

EPSILON = 1e-5  # of every norm but the last
LAST_EPSILON = 1e-6
ROPE_BASE = 256.0
MULTIPLE = 32  # that the tokens of an image, and of a text, are filled up to
TIME_SCALE = 1000.0
TIME_HIDDEN, TIME_WIDTH = 1024, 256  # of time embedders

CLASS = "ZImageTransformer2DModel"
# Keys of config.json: our field and the published class's default.
_FIELDS = {
    "n_layers": ("layers", 30),
    "n_refiner_layers": ("refiners", 2),
    "n_heads": ("heads", 30),
    "in_channels": ("latent_channels", 16),
    "cap_feat_dim": ("text_width", 2560),
    "axes_dims": ("rope_axes", (32, 48, 48)),
}
_ONLY = {
    "_class_name": CLASS, "all_patch_size": [2], "all_f_patch_size": [1], "norm_eps": EPSILON,
    "qk_norm": True, "rope_theta": ROPE_BASE, "siglip_feat_dim": None, "t_scale": TIME_SCALE,
}
_DERIVED = ("dim", "n_kv_heads", "axes_lens")  # the last is the length of a table of angles


@dataclasses.dataclass(frozen=True)
class Config(TextSettings):
    """The published values."""

    name: str = "zimage"
    sample_shape: tuple[int, ...] = (128, 128, 16)
    layers: int = option(30, "of the transformer", least=1)
    refiners: int = option(2, "layers of the image alone, and of the text alone, first", least=1)
    heads: int = option(30, "of attention", least=1)
    head_dim: int = option(128, "channels of a head", least=1)
    latent_channels: int = option(16, "of the autoencoder", least=1)
    patch: int = option(2, "latents a token covers along each side", least=1)
    text_width: int = option(2560, "of the text tokens", least=1)
    rope_axes: tuple[int, int, int] = option(
        (32, 48, 48), "channels of a head rotated by its token's frame, row and column", least=1
    )
    sign_of_zero: int = option(
        1, "of a time that is 0; 0 is TwinFlow's released Z-Image, which takes the target time 0 "
        "for noise", least=0, most=1,
    )

    splits_tokens = True

    def problems(self) -> list[str]:
        return super().problems() + axes_problems(self.rope_axes, self.head_dim)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def hidden(self) -> int:
        """Of the feed-forward parts."""
        return int(self.width / 3 * 8)

    @property
    def time_widths(self) -> tuple[int, int]:
        """Hidden and of what comes out, of time embedders."""
        return TIME_HIDDEN, min(self.width, TIME_WIDTH)

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """As `family.PublishedConfig` says."""
        values, mistyped, problems = settings.published(config, _FIELDS, _ONLY, _DERIVED)
        width, heads = config.get("dim", 3840), values["heads"]
        if not mistyped and (type(width) is not int or width <= 0 or width % heads):
            problems.append(f"dim {width!r} is no multiple of n_heads {heads}")
        if config.get("n_kv_heads", 30) != heads:
            problems.append(f"n_kv_heads {config.get('n_kv_heads', 30)} is not n_heads {heads}")
        settings.refuse("config.json of the transformer", problems + mistyped)
        shape = (128, 128, values["latent_channels"])
        return cls(**values, head_dim=width // heads, sample_shape=shape)


def found(config: Config, lacking: Collection[str]) -> Config:
    """The config of weights that lack some keys: TwinFlow's, which know r and not the twin, count
    a time that is 0 as they were trained."""
    groups = table(config)
    theirs = groups.group(names.KNOWS_R).isdisjoint(lacking) and groups.group(TWIN) <= {*lacking}
    return dataclasses.replace(config, sign_of_zero=0) if theirs else config


def angles(places: np.ndarray, width: int) -> Float[np.ndarray, "N half"]:
    """By which pairs of `width` channels turn at these places; multiplied in float64."""
    frequencies = 1.0 / ROPE_BASE ** (np.arange(0, width, 2) / width)
    return (places[:, None] * frequencies).astype(np.float32)


class Attention(nn.Module):
    """Of each token to all of its row, `lengths` of which count."""

    config: Config

    @nn.compact
    def __call__(
        self, h: Float[Array, "B S D"], lengths: Lengths | None,
        cos: Float[AnyArray, "#B S half"], sin: Float[AnyArray, "#B S half"],
    ) -> Float[Array, "B S D"]:
        c, parts = self.config, []
        for name in ("query", "key", "value"):
            part = HeadProjection(c, use_bias=False, name=name)(h)
            if name != "value":
                part = rms_norm(EPSILON, "float32", f"{name}_norm")(part)
                part = rotate(part, cos, sin).astype(c.dtype)
            parts.append(checkpoint_name(jnp.swapaxes(part, 1, 2), name))
        attended = checkpoint_name(attention(*parts, lengths=lengths), "attention_output")
        out = dense(c, c.width, ("heads", "embed"), "out", bias=False)
        return out(attended.reshape(*h.shape[:2], c.width))


class Block(nn.Module):
    """Attention and feed-forward, each between two norms; `(h, ...) -> (h, None)`.

    context: the time embedding, which scales and gates; None in a text's refiner.
    """

    config: Config

    @nn.compact
    def __call__(
        self, h: Float[Array, "B S D"], context: Float[Array, "B E"] | None,
        lengths: Lengths | None, cos: Float[AnyArray, "#B S half"],
        sin: Float[AnyArray, "#B S half"],
    ):
        c = self.config
        h = checkpoint_name(tokens(h), "block_input")
        terms = (0.0, 1.0, 0.0, 1.0)
        if context is not None:
            zeros = nn.initializers.zeros
            modulation = dense(c, 4 * c.width, (None, "modulation"), "modulation", kernel=zeros)
            terms = jnp.split(modulation(context)[:, None].astype(jnp.float32), 4, axis=-1)
            terms = [nn.tanh(term) if i % 2 else term for i, term in enumerate(terms)]
        scale_1, gate_1, scale_2, gate_2 = terms
        norm = lambda name: rms_norm(EPSILON, "float32", name)
        inner = (norm("attention_norm")(h) * (1 + scale_1)).astype(c.dtype)
        update = Attention(c, name="attention")(inner, lengths, cos, sin)
        h = (h + gate_1 * norm("attention_out_norm")(update)).astype(c.dtype)
        inner = (norm("mlp_norm")(h) * (1 + scale_2)).astype(c.dtype)
        update = decoder.GatedMLP(c, nn.silu, name="mlp")(inner)
        return tokens((h + gate_2 * norm("mlp_out_norm")(update)).astype(c.dtype)), None


class Transformer(nn.Module):
    """Velocity of latents under text.

    `(x_t (B, H, W, C), t (B,), r (B,), cond) -> (B, H, W, C)`, float32; H and W are multiples
    of the patch, t and r are in [-1, 1]. cond: {"tokens": (B, L, text_width), "mask": (B, L),
    true at each row's valid tokens, which come before its padding}. Rows do not depend on L.

    An image's tokens are filled up with a learned one to a multiple of 32, and so are a row's own
    text tokens; these are attended to as others are.

    Raises:
      UserError: latents whose sides are no multiples of the patch.
    """

    config: Config

    @nn.compact
    def __call__(self, x_t: Maps, t: Times, r: Times, cond: dict) -> Maps:
        c, (rows, channels) = self.config, (x_t.shape[0], x_t.shape[-1])
        grid = patches.grid(x_t, c.patch)
        context = self._embedded(t, r)
        filler = lambda name: self.param(
            name, init_of(nn.initializers.normal(0.02), None, None), (1, c.width)
        )[None].astype(c.dtype)

        image = dense(c, c.width, (None, None), "image_in")(patches.pack(x_t, c.patch))
        count = image.shape[1]
        more = jnp.broadcast_to(filler("image_padding"), (rows, -count % MULTIPLE, c.width))
        image = jnp.concatenate([image, more], axis=1)

        valid = cond["mask"].astype(jnp.int32).sum(1)
        own = MULTIPLE * jnp.maximum(-(-valid // MULTIPLE), 1)  # text tokens of each row
        text = cond["tokens"]
        text = jnp.pad(text, ((0, 0), (0, -text.shape[1] % MULTIPLE), (0, 0)))
        text = rms_norm(EPSILON, c.dtype, name="text_norm")(text)
        text = dense(c, c.width, ("text", None), "text_in")(text)
        is_text = jnp.arange(text.shape[1])[None] < valid[:, None]
        text = jnp.where(is_text[..., None], text, filler("text_padding"))

        turns = [self._turns(turn, own, grid, image.shape[1], text.shape[1])
                 for turn in (np.cos, np.sin)]
        of_image, of_text = zip(*turns, strict=True)
        whole = [
            jnp.concatenate([a, jnp.broadcast_to(b, (rows, *b.shape[1:]))], axis=1)
            for a, b in turns
        ]
        image = run_layers(
            self, Block, c.refiners, c.remat, image, per_row=(context, None, *of_image),
            name="image_refiner",
        )
        text = run_layers(
            self, Block, c.refiners, c.remat, text, per_row=(None, own), constants=of_text,
            name="text_refiner",
        )
        h = run_layers(
            self, Block, c.layers, c.remat, jnp.concatenate([image, text], axis=1),
            per_row=(context, image.shape[1] + own, *whole),
        )

        scale = dense(c, c.width, (None, "modulation"), "final_modulation",
                      kernel=nn.initializers.zeros)(nn.silu(context))
        norm = nn.LayerNorm(
            LAST_EPSILON, dtype="float32", use_bias=False, use_scale=False,
            use_fast_variance=False,
        )
        h = norm(h[:, :count]) * (1 + scale[:, None].astype(jnp.float32))
        out = dense(c, channels * c.patch**2, ("embed", None), "out",
                    kernel=nn.initializers.zeros)(h)
        return -patches.unpack(out.astype(jnp.float32), grid, c.patch)

    def _embedded(self, t: Times, r: Times) -> Float[Array, "B E"]:
        """The time embedding."""
        c, times = self.config, self.config.times
        native = lambda a: jnp.where(a == 0, c.sign_of_zero, jnp.sign(a)) - a

        def embedded(name: str, values: Times, last=None) -> Float[Array, "B E"]:
            embedder = SinusoidEmbedder(c, last=last, widths=c.time_widths, name=name)
            return embedder(TIME_SCALE * values).astype(jnp.float32)

        zeros, gap = nn.initializers.zeros, native(r) - native(t)
        context = embedded("time_embedder", jnp.abs(native(times.first(t, r))))
        if times.second:
            seen, weight = (r, times.weight(t, r)) if times.last else (gap, jnp.abs(gap))
            context += weight[:, None] * embedded(times.second, seen, zeros)
        of_twin = embedded(TWIN, jnp.abs(native(t)), zeros)
        return context + jnp.where(t[:, None] < 0, of_twin, 0.0)

    def _turns(
        self, turn, own: Lengths, grid: tuple[int, int], image: int, text: int
    ) -> tuple[Float[Array, "B S half"], Float[np.ndarray, "1 T half"]]:
        """`turn` of the angles of the image's tokens, which depend on the row's own number of text
        tokens, and of the text's.

        Text lies along the frames, from 1 on; the image in the frame after it, and what fills it
        up at the origin. image, text: numbers of tokens.
        """
        of_frame, of_row, of_column = self.config.rope_axes
        frames = turn(angles(np.arange(text + 2), of_frame))
        still = np.zeros((text, (of_row + of_column) // 2), np.float32)
        of_text = np.concatenate([frames[1 : text + 1], turn(still)], axis=1)[None]
        rows, columns = np.indices(grid).reshape(2, -1)
        places = np.concatenate([angles(rows, of_row), angles(columns, of_column)], axis=1)
        filled = image - len(places)
        places = turn(np.pad(places, ((0, filled), (0, 0))))[None]
        is_image = (np.arange(image) < image - filled)[None, :, None]
        frame = jnp.where(is_image, jnp.asarray(frames)[own + 1][:, None], frames[0][None, None])
        places = jnp.broadcast_to(places, (len(own), *places.shape[1:]))
        return jnp.concatenate([frame, places], axis=-1), of_text


def _block(modulated: bool) -> tuple[tuple[str, str, str], ...]:
    """(key, path, layout) of a block's tensors."""
    return (
        *(names.linear("adaLN_modulation.0", "modulation") if modulated else ()),
        ("attention_norm1.weight", "attention_norm/scale", "same"),
        ("attention_norm2.weight", "attention_out_norm/scale", "same"),
        ("ffn_norm1.weight", "mlp_norm/scale", "same"),
        ("ffn_norm2.weight", "mlp_out_norm/scale", "same"),
        *names.linear("attention.to_q", "attention/query", bias=False),
        *names.linear("attention.to_k", "attention/key", bias=False),
        *names.linear("attention.to_v", "attention/value", bias=False),
        *names.linear("attention.to_out.0", "attention/out", bias=False),
        ("attention.norm_q.weight", "attention/query_norm/scale", "same"),
        ("attention.norm_k.weight", "attention/key_norm/scale", "same"),
        *names.linear("feed_forward.w1", "mlp/gate", bias=False),
        *names.linear("feed_forward.w3", "mlp/up", bias=False),
        *names.linear("feed_forward.w2", "mlp/down", bias=False),
    )


def _embedder(key: str, path: str) -> tuple[tuple[str, str, str], ...]:
    return (*names.linear(f"{key}.mlp.0", f"{path}/hidden"),
            *names.linear(f"{key}.mlp.2", f"{path}/out"))


def table(config: Config) -> names.NameTable:
    """The published tensors' names. Those of embedders that a checkpoint lacks start as the first
    one's, with zeros for the last layer."""
    times, first = config.times, "t_embedder"

    def added(suffix: str, path: str, group: str) -> tuple[names.Rule, ...]:
        return tuple(
            names.Rule(key, to, layout, group=group, **(
                {"normal": 0.0} if "/out/" in to else {"copy_of": key.replace(suffix, "")}
            ))
            for key, to, layout in _embedder(first + suffix, path)
        )

    single = (
        *names.linear("all_x_embedder.2-1", "image_in"),
        ("x_pad_token", "image_padding", "same"),
        ("cap_embedder.0.weight", "text_norm/scale", "same"),
        *names.linear("cap_embedder.1", "text_in"),
        ("cap_pad_token", "text_padding", "same"),
        *_embedder(first, "time_embedder"),
        *names.linear("all_final_layer.2-1.adaLN_modulation.1", "final_modulation"),
        *names.linear("all_final_layer.2-1.linear", "out"),
    )
    rotated = ("/query/kernel", "/key/kernel", "/query_norm/scale", "/key_norm/scale")
    stacks = (
        *names.stack("noise_refiner", _block(True), "image_refiner", config.refiners),
        *names.stack("context_refiner", _block(False), "text_refiner", config.refiners),
        *names.stack("layers", _block(True), "layers", config.layers),
    )
    return names.NameTable(
        rules=(
            *(names.Rule(*rule) for rule in single),
            *(added(times.suffix, times.second, names.KNOWS_R) if times.second else ()),
            *added("_3", TWIN, TWIN),
            *(
                dataclasses.replace(rule, pairs=config.head_dim)
                if rule.path.endswith(rotated) else rule
                for rule in stacks
            ),
        ),
        prefixes=names.TRAINERS,
    )

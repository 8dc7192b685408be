"""The SANA transformer: linear self-attention, text cross-attention and a convolutional MLP.

The same function as diffusers' SanaTransformer2DModel for SANA 1.0, 1.5 and Sprint, with
TwinFlow's second time: both outputs of the time's AdaLN-single become m1(t) + (t - r) m2(r), or
see r otherwise (`conditioning.TIMES`). There is no positional embedding: the MLPs' 3x3
convolutions tell where a token is.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from twinflow_jax.arrays import Lengths, Maps, TextTokens, Times
from twinflow_jax.errors import UserError
from twinflow_jax.keys import option
from twinflow_jax.models import names, settings
from twinflow_jax.models.attention import attention
from twinflow_jax.models.axes import rows
from twinflow_jax.models.conditioning import SinusoidEmbedder, embedder_names
from twinflow_jax.models.convolution import Depthwise
from twinflow_jax.models.linear_attention import linear_attention
from twinflow_jax.models.projections import UNIT_VARIANCE, dense, rms_norm
from twinflow_jax.models.settings import TextSettings
from twinflow_jax.models.stack import run_layers

EPSILON = 1e-6  # of the norms before self-attention, MLP and output
RMS_EPSILON = 1e-5  # of the norms of text, queries and keys

CLASS = "SanaTransformer2DModel"
# Keys of config.json: our field and the published class's default.
_FIELDS = {
    "num_layers": ("layers", 20),
    "num_attention_heads": ("heads", 70),
    "attention_head_dim": ("head_dim", 32),
    "num_cross_attention_heads": ("cross_heads", 20),
    "cross_attention_head_dim": ("cross_head_dim", 112),
    "in_channels": ("latent_channels", 32),
    "caption_channels": ("text_width", 2304),
    "mlp_ratio": ("mlp_ratio", 2.5),
    "guidance_embeds": ("guidance_embeds", False),
    "guidance_embeds_scale": ("guidance_embeds_scale", 0.1),
    "timestep_scale": ("timestep_scale", 1.0),
}
_ONLY = {
    "_class_name": CLASS, "patch_size": 1, "attention_bias": False, "dropout": 0.0,
    "norm_elementwise_affine": False, "norm_eps": EPSILON, "interpolation_scale": None,
}
_QK_NORMS = {None: False, "rms_norm_across_heads": True}
_DERIVED = ("out_channels", "cross_attention_dim", "sample_size", "qk_norm")


@dataclasses.dataclass(frozen=True)
class Config(TextSettings):
    """The published values of SANA-0.6B at 512 pixels."""

    name: str = "sana"
    sample_shape: tuple[int, ...] = (16, 16, 32)
    layers: int = option(28, "of the transformer", least=1)
    heads: int = option(36, "of attention", least=1)
    head_dim: int = option(32, "channels of a head", least=1)
    cross_heads: int = option(16, "of the attention to the text", least=1)
    cross_head_dim: int = option(72, "channels of such a head", least=1)
    latent_channels: int = option(32, "of the autoencoder", least=1)
    text_width: int = option(2304, "of the text tokens", least=1)
    mlp_ratio: float = option(2.5, "of the MLP's width to the model's", above=0)
    qk_norm: bool = option(False, "whether queries and keys are normalised (1.5, Sprint)")
    guidance_embeds: bool = option(False, "whether the guidance scale has an embedder (Sprint)")
    guidance_embeds_scale: float = option(0.1, "that the guidance scale is multiplied by")
    timestep_scale: float = option(1.0, "that diffusers multiplies its times by", above=0)

    def problems(self) -> list[str]:
        return settings.not_positive(self, ("mlp_width",)) + super().problems()

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        return int(self.mlp_ratio * self.width)

    @property
    def time_scale(self) -> float:
        """What the embedders see of a time in [-1, 1].

        diffusers' SanaPipeline passes 1000 timestep_scale t, where timestep_scale is 1, or .001
        for Sprint's teacher. SanaSprintPipeline passes t itself, whatever timestep_scale says,
        where t is sin/(cos + sin) of its angle: the time of the straight path through x_t.
        """
        return 1.0 if self.guidance_embeds else 1000.0 * self.timestep_scale

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """As `family.PublishedConfig` says."""
        values, mistyped, problems = settings.published(config, _FIELDS, _ONLY, _DERIVED)
        norm, side = config.get("qk_norm"), config.get("sample_size", 32)
        if norm not in _QK_NORMS:
            problems.append(f"qk_norm is {norm!r}, neither null nor 'rms_norm_across_heads'")
        if type(side) is not int:
            problems.append(f"sample_size is {side!r}, not of type int")
        channels = values["latent_channels"]
        out = config.get("out_channels", 32) or channels  # the published class reads null so
        if out != channels:
            problems.append(f"out_channels {out} differs from in_channels {channels}")
        text, heads, head_dim = (
            config.get("cross_attention_dim", 2240), values["heads"], values["head_dim"]
        )
        if text != heads * head_dim:
            problems.append(
                f"cross_attention_dim {text} is not num_attention_heads {heads} times "
                f"attention_head_dim {head_dim}"
            )
        settings.refuse("config.json of the transformer", problems + mistyped)
        return cls(**values, qk_norm=_QK_NORMS[norm], sample_shape=(side, side, channels))


def _shift_scale_table(module: nn.Module, rows: int, name: str) -> Float[Array, "{rows} D"]:
    """A parameter that is added to a modulation."""
    width = module.config.width
    normal = nn.initializers.normal(width**-0.5)
    init = nn.with_logical_partitioning(normal, (None, None))
    return module.param(name, init, (rows, width))


def _modulated(
    h: Float[Array, "B H W D"], shift: Float[Array, "B 1 1 D"], scale: Float[Array, "B 1 1 D"]
) -> Float[Array, "B H W D"]:
    """h with zero mean and unit variance, scaled by 1 + scale and shifted; float32."""
    norm = nn.LayerNorm(
        EPSILON, dtype="float32", use_bias=False, use_scale=False, use_fast_variance=False
    )
    return norm(h) * (1.0 + scale) + shift


class AdaLNSingle(nn.Module):
    """`(time (B,), guidance (B,) or None) -> (modulation (B, 6, D), embedding (B, D))`, float32.

    The modulation is that of all blocks, the embedding that of the output; numbers come scaled.
    last: initialises the last kernel of the embedding, and so both where it is zero.
    """

    config: Config
    last: Callable | None = None

    @nn.compact
    def __call__(self, time: Float[Array, "B"], guidance: Float[Array, "B"] | None = None):
        c, normal = self.config, nn.initializers.normal(0.02)
        embedder = functools.partial(SinusoidEmbedder, c, kernel=normal, last=self.last)
        embedding = embedder(name="time")(time).astype(jnp.float32)
        if guidance is not None:
            embedding += embedder(name="guidance")(guidance)
        modulation = dense(
            c, 6 * c.width, ("embed", "modulation"), "modulation", kernel=normal
        )(nn.silu(embedding))
        return modulation.astype(jnp.float32).reshape(-1, 6, c.width), embedding


class Attention(nn.Module):
    """Queries from h, keys and values from context; `attend` maps these to the queries' means.

    input_bias: whether the first three projections have one.
    """

    config: Config
    heads: int
    head_dim: int
    input_bias: bool

    @nn.compact
    def __call__(
        self, h: Float[Array, "B S D"], context: Float[Array, "B T D"], attend: Callable
    ) -> Float[Array, "B S D"]:
        c, inner = self.config, self.heads * self.head_dim
        parts = []
        for name, source in (("query", h), ("key", context), ("value", context)):
            part = dense(c, inner, ("embed", "heads"), name, bias=self.input_bias)(source)
            if c.qk_norm and name != "value":
                # Over all heads together.
                part = rms_norm(RMS_EPSILON, c.dtype, f"{name}_norm")(part)
            part = part.reshape(*part.shape[:2], self.heads, self.head_dim)
            parts.append(checkpoint_name(part, name))
        attended = checkpoint_name(attend(*parts), "attention_output")
        return dense(c, c.width, ("heads", "embed"), "out")(attended.reshape(*h.shape[:2], inner))


class GatedConvolution(nn.Module):
    """The MLP: its hidden channels see their neighbours, and one half gates the other."""

    config: Config

    @nn.compact
    def __call__(self, h: Maps) -> Maps:
        c, channels = self.config, 2 * self.config.mlp_width
        hidden = dense(c, channels, ("embed", "mlp"), "hidden")(h)
        hidden = nn.silu(checkpoint_name(hidden, "mlp_hidden"))
        hidden = Depthwise(
            3, c.dtype, name="depthwise",
            kernel_init=nn.with_logical_partitioning(UNIT_VARIANCE, (None, None, None, "mlp")),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("mlp",)),
        )(hidden)
        value, gate = jnp.split(hidden, 2, axis=-1)
        return dense(c, c.width, ("mlp", "embed"), "out", bias=False)(value * nn.silu(gate))


class Block(nn.Module):
    """`(h, ...) -> (h, None)`."""

    config: Config

    @nn.compact
    def __call__(
        self, h: Float[Array, "B H W D"], modulation: Float[Array, "B 6 D"],
        text: TextTokens, lengths: Lengths,
    ):
        c = self.config
        h = checkpoint_name(rows(h), "block_input")
        terms = modulation + _shift_scale_table(self, 6, "modulation")[None]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.moveaxis(
            terms[:, :, None, None], 1, 0
        )
        tokens = lambda x: x.reshape(x.shape[0], -1, c.width)

        x = tokens(_modulated(h, shift_1, scale_1))
        self_attention = Attention(c, c.heads, c.head_dim, False, name="self_attention")
        update = self_attention(x, x, linear_attention).reshape(h.shape)
        h = (h + gate_1 * update).astype(c.dtype)

        cross_attention = Attention(
            c, c.cross_heads, c.cross_head_dim, True, name="cross_attention"
        )
        attend = functools.partial(attention, lengths=lengths)
        h = h + cross_attention(tokens(h), text, attend).reshape(h.shape)

        update = GatedConvolution(c, name="mlp")(_modulated(h, shift_2, scale_2))
        return rows((h + gate_2 * update).astype(c.dtype)), None


class Transformer(nn.Module):
    """Velocity of latents under text.

    `(x_t (B, H, W, C), t (B,), r (B,), cond) -> (B, H, W, C)`, float32, for any H and W; t and
    r are in [-1, 1]. cond: {"tokens": (B, L, text_width), "mask": (B, L), true at each row's
    valid tokens, of which there is at least one and which come before its padding; "guidance":
    (B,) float32 guidance scales as users give them, say 4.5, for a config with
    guidance_embeds}. Rows do not depend on L.

    Raises:
      UserError: guidance scales are missing.
    """

    config: Config

    @nn.compact
    def __call__(self, x_t: Maps, t: Times, r: Times, cond: dict) -> Maps:
        c = self.config
        guidance = None
        if c.guidance_embeds:
            if "guidance" not in cond:
                raise UserError(
                    "the condition has no 'guidance': this transformer embeds a guidance scale "
                    "(B,), give one for each row"
                )
            guidance = c.guidance_embeds_scale * cond["guidance"]
        h = dense(c, c.width, (None, None), "latent_in")(x_t)
        text = dense(c, c.width, ("text", None), "text_hidden")(cond["tokens"])
        text = dense(c, c.width, ("embed", None), "text_out")(nn.gelu(text, approximate=True))
        # SANA's training starts from 0.01.
        text = rms_norm(RMS_EPSILON, c.dtype, "text_norm", scale=0.01)(text)

        times = c.times
        first = AdaLNSingle(c, name="time_embedder")
        modulation, embedding = first(c.time_scale * times.first(t, r), guidance)
        if times.second:
            second = AdaLNSingle(c, times.last, name=times.second)(c.time_scale * r)
            weight = times.weight(t, r)
            modulation += weight[:, None, None] * second[0]
            embedding += weight[:, None] * second[1]

        lengths = cond["mask"].astype(jnp.int32).sum(1)
        h = run_layers(
            self, Block, c.layers, c.remat, h, per_row=(modulation, text, lengths)
        )

        terms = embedding[:, None] + _shift_scale_table(self, 2, "final_modulation")[None]
        shift, scale = jnp.moveaxis(terms[:, :, None, None], 1, 0)
        out = dense(
            c, c.latent_channels, ("embed", None), "out", kernel=nn.initializers.zeros
        )
        return out(_modulated(h, shift, scale)).astype(jnp.float32)


def _attention(key: str, path: str, input_bias: bool, qk_norm: bool):
    norms = tuple(
        (f"{key}.norm_{name[0]}.weight", f"{path}/{name}_norm/scale", "same")
        for name in ("query", "key") if qk_norm
    )
    return (
        *names.linear(f"{key}.to_q", f"{path}/query", input_bias),
        *names.linear(f"{key}.to_k", f"{path}/key", input_bias),
        *names.linear(f"{key}.to_v", f"{path}/value", input_bias),
        *norms,
        *names.linear(f"{key}.to_out.0", f"{path}/out"),
    )


def table(config: Config) -> names.NameTable:
    """The published tensors' names; TwinFlow's second embedder, if missing, starts at random.

    It embeds r alone, also beside guidance, and has the keys of TwinFlow's wrapper for SANA.
    """
    first = "time_embed" if config.guidance_embeds else "time_embed.emb"
    guidance = embedder_names("time_embed.guidance_embedder", "time_embedder/guidance")
    single = (
        ("patch_embed.proj.weight", "latent_in/kernel", "pointwise"),
        ("patch_embed.proj.bias", "latent_in/bias", "same"),
        *names.linear("caption_projection.linear_1", "text_hidden"),
        *names.linear("caption_projection.linear_2", "text_out"),
        ("caption_norm.weight", "text_norm/scale", "same"),
        *embedder_names(f"{first}.timestep_embedder", "time_embedder/time"),
        *(guidance if config.guidance_embeds else ()),
        *names.linear("time_embed.linear", "time_embedder/modulation"),
        ("scale_shift_table", "final_modulation", "same"),
        *names.linear("proj_out", "out"),
    )
    times, key = config.times, f"time_embed{config.times.suffix}"
    second = (
        *embedder_names(f"{key}.emb.timestep_embedder", f"{times.second}/time"),
        *names.linear(f"{key}.linear", f"{times.second}/modulation"),
    )
    normal = lambda key: 0.02 if key.endswith("weight") else 0.0
    start = lambda key: {} if times.last else {"normal": normal(key), "group": names.KNOWS_R}
    block = (
        ("scale_shift_table", "modulation", "same"),
        *_attention("attn1", "self_attention", False, config.qk_norm),
        *_attention("attn2", "cross_attention", True, config.qk_norm),
        ("ff.conv_inverted.weight", "mlp/hidden/kernel", "pointwise"),
        ("ff.conv_inverted.bias", "mlp/hidden/bias", "same"),
        ("ff.conv_depth.weight", "mlp/depthwise/kernel", "conv"),
        ("ff.conv_depth.bias", "mlp/depthwise/bias", "same"),
        ("ff.conv_point.weight", "mlp/out/kernel", "pointwise"),
    )
    return names.NameTable(
        rules=(
            *(names.Rule(*rule) for rule in single),
            *(names.Rule(*rule, **start(rule[0])) for rule in second if times.second),
            *names.stack("transformer_blocks", block, "layers", config.layers),
        ),
        prefixes=names.TRAINERS,
    )

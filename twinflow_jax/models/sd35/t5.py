"""The encoder of T5 v1.1 (XXL), whose last states Stable Diffusion 3 reads."""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from twinflow_jax.arrays import TextIds, TextMask, TextTokens
from twinflow_jax.models import decoder, names, settings
from twinflow_jax.models.axes import init_of, rows
from twinflow_jax.models.projections import rms_norm
from twinflow_jax.models.stack import run_layers

ARCHITECTURE = "T5EncoderModel"

# Of a published config: our field and the default of transformers' T5Config.
NUMBERS = {
    "vocab_size": ("vocab", 32128),
    "d_model": ("width", 512),
    "d_kv": ("head_dim", 64),
    "d_ff": ("hidden", 2048),
    "num_layers": ("layers", 6),
    "num_heads": ("heads", 8),
    "relative_attention_num_buckets": ("buckets", 32),
    "relative_attention_max_distance": ("farthest", 128),
    "layer_norm_epsilon": ("norm_eps", 1e-6),
}
ONLY = {
    "model_type": "t5", "architectures": [ARCHITECTURE], "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new", "is_gated_act": True,
}
OTHERS = (  # without effect on a text's states
    "classifier_dropout", "dropout_rate", "initializer_factor", "is_decoder",
    "is_encoder_decoder", "num_decoder_layers", "output_past", "scale_decoder_outputs",
    *decoder.HARMLESS,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """T5 v1.1 XXL's. buckets: of distances between tokens, of which those from `farthest` on are
    one. dtype: of the computation, "float32" or "bfloat16"."""

    vocab: int = 32128
    width: int = 4096
    head_dim: int = 64
    hidden: int = 10240
    layers: int = 24
    heads: int = 64
    buckets: int = 32
    farthest: int = 128
    norm_eps: float = 1e-6
    dtype: str = "float32"

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """As `family.PublishedConfig` says."""
        assumed = {"feed_forward_proj": "relu"}  # which is T5's before 1.1
        values, mistyped, problems = settings.published(assumed | config, NUMBERS, ONLY, OTHERS)
        if not mistyped and (values["buckets"] % 4 or 4 * values["farthest"] <= values["buckets"]):
            problems.append("relative_attention_* make no buckets")
        settings.refuse("this config.json is not of T5's text encoder", problems + mistyped)
        return cls(**values)


def buckets(config: Config, length: int) -> Int[np.ndarray, "{length} {length}"]:
    """Of the distance from each query to each key: half of them for keys after it.

    Of each half, half are single distances and the others grow with its logarithm, float32.
    """
    places, half = np.arange(length), config.buckets // 2
    gap = places[None] - places[:, None]
    single, far = half // 2, np.abs(gap)
    grown = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(single))
    grown = grown / np.float32(np.log(config.farthest / single)) * np.float32(half - single)
    far = np.where(far < single, far, np.minimum(single + grown.astype(int), half - 1))
    return far + np.where(gap > 0, half, 0)


class Block(nn.Module):
    """Attention to all tokens, then a gated MLP, each after a norm; `(h, bias) -> (h, None)`."""

    config: Config

    @nn.compact
    def __call__(self, h: TextTokens, bias: Float[Array, "B heads L L"]):
        c, h = self.config, rows(h)
        norm = lambda name: rms_norm(c.norm_eps, c.dtype, name)
        h = h + decoder.attended(
            c, norm("attention_norm")(h), c.heads * c.head_dim, biased=False, bias=bias, scale=1.0
        )
        gelu = functools.partial(nn.gelu, approximate=True)
        return h + decoder.GatedMLP(c, gelu, name="mlp")(norm("mlp_norm")(h)), None


class TextEncoder(nn.Module):
    """transformers' T5EncoderModel, of which it gives the `last_hidden_state`."""

    config: Config

    @nn.compact
    def __call__(self, ids: TextIds, mask: TextMask) -> TextTokens:
        """The states of all tokens. mask: is not looked at: padding is seen as other tokens are."""
        c, (count, length) = self.config, ids.shape
        init = init_of(nn.initializers.normal(c.width**-0.5), None, None)
        distances = self.param("distances", init, (c.buckets, c.heads))
        bias = jnp.moveaxis(distances[buckets(c, length)], -1, 0)
        bias = jnp.broadcast_to(bias[None], (count, *bias.shape))
        h = decoder.embedded(self, ids)
        h = run_layers(self, Block, c.layers, "none", h, per_row=(bias,))
        return rms_norm(c.norm_eps, c.dtype, "norm")(h)


def table(config: Config) -> names.NameTable:
    """The published names. Some files have the embedding twice, as it is tied."""
    attention, mlp = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    layer = (
        ("layer.0.layer_norm.weight", "attention_norm/scale", "same"),
        *names.linear(f"{attention}.q", "query", bias=False),
        *names.linear(f"{attention}.k", "key", bias=False),
        *names.linear(f"{attention}.v", "value", bias=False),
        *names.linear(f"{attention}.o", "out", bias=False),
        ("layer.1.layer_norm.weight", "mlp_norm/scale", "same"),
        *names.linear(f"{mlp}.wi_0", "mlp/gate", bias=False),
        *names.linear(f"{mlp}.wi_1", "mlp/up", bias=False),
        *names.linear(f"{mlp}.wo", "mlp/down", bias=False),
    )
    return names.NameTable(
        rules=(
            names.Rule("shared.weight", "embedding"),
            names.Rule(f"encoder.block.0.{attention}.relative_attention_bias.weight", "distances"),
            *names.stack("encoder.block", layer, "layers", config.layers),
            names.Rule("encoder.final_layer_norm.weight", "norm/scale"),
        ),
        carried=(r"encoder\.embed_tokens\.weight",),
    )

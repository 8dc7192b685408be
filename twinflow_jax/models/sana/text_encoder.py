"""SANA's text encoder: the decoder of Gemma-2-2b, without its output head.

Its last state, after the final norm, is what the image model reads. Half of its layers attend
within a sliding window; texts are refused that would not fit into it, so all layers are equal.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.arrays import Lengths, TextIds, TextMask, TextTokens
from twinflow_jax.errors import UserError
from twinflow_jax.models import decoder, names, settings
from twinflow_jax.models.axes import init_of, rows
from twinflow_jax.models.decoder import Angles, Attention, GatedMLP

ARCHITECTURES = ("Gemma2Model", "Gemma2ForCausalLM")

# Of a published config: our field and the default of transformers' Gemma2Config.
NUMBERS = {
    "vocab_size": ("vocab", 256000),
    "hidden_size": ("width", 2304),
    "num_hidden_layers": ("layers", 26),
    "num_attention_heads": ("heads", 8),
    "num_key_value_heads": ("kv_heads", 4),
    "head_dim": ("head_dim", 256),
    "intermediate_size": ("hidden", 9216),
    "sliding_window": ("window", 4096),
    "attn_logit_softcapping": ("softcap", 50.0),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 1e4),
}
ONLY = {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}  # that we compute
# What else may stand there: checked below, or without effect on the states of a text.
OTHERS = (
    "architectures", "attention_bias", "cache_implementation", "final_logit_softcapping",
    "hidden_act", "layer_types", "max_position_embeddings", "query_pre_attn_scalar",
    "sliding_window_size", "use_bidirectional_attention",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The published Gemma-2-2b. dtype: of the computation, "float32" or "bfloat16".

    window: the most tokens of a text. softcap: of the attention's scores.
    """

    vocab: int = 256000
    width: int = 2304
    layers: int = 26
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 256
    hidden: int = 9216
    window: int = 4096
    softcap: float = 50.0
    rope_theta: float = 1e4
    norm_eps: float = 1e-6
    dtype: str = "float32"

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """As `family.PublishedConfig` says."""
        values, mistyped, problems = decoder.published(
            config, NUMBERS, ONLY, OTHERS, ("default",)
        )
        architectures = config.get("architectures") or ARCHITECTURES[:1]
        if not set(architectures) <= set(ARCHITECTURES):
            expected = " or ".join(ARCHITECTURES)
            problems.append(f"architectures is {architectures!r}, not {expected}")
        if not mistyped and values["head_dim"] % 2:
            problems.append("head_dim is odd")
        if config.get("query_pre_attn_scalar", 256) != values["head_dim"]:
            problems.append("query_pre_attn_scalar is not head_dim")
        problems += [
            f"{key} is set" for key in ("attention_bias", "use_bidirectional_attention")
            if config.get(key)
        ]
        others = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
        problems += [f"layer_types has {kind!r}" for kind in sorted(others)]
        settings.refuse("this config.json is not of SANA's text encoder", problems + mistyped)
        return cls(**values)


class RMSNorm(nn.Module):
    """Scales by 1 + scale, all in float32, as transformers' Gemma2RMSNorm does."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", init_of(nn.initializers.zeros, None), x.shape[-1:])
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.config.norm_eps)
        scale = jax.lax.broadcast_to_rank(1 + scale.astype(jnp.float32), x.ndim)
        return (x * scale).astype(self.config.dtype)


class Block(nn.Module):
    """Causal grouped-query attention, then gated GELU, each between two norms.

    `(h, ...) -> (h, None)`.
    """

    config: Config

    @nn.compact
    def __call__(self, h: TextTokens, lengths: Lengths, angles: Angles):
        c, h = self.config, rows(h)
        attended = Attention(c, softcap=c.softcap, name="attention")(
            RMSNorm(c, name="attention_norm")(h), angles, lengths
        )
        h = h + RMSNorm(c, name="attention_out_norm")(attended)
        inner = GatedMLP(c, nn.gelu, name="mlp")(RMSNorm(c, name="mlp_norm")(h))  # of tanh
        return h + RMSNorm(c, name="mlp_out_norm")(inner), None


class TextEncoder(nn.Module):
    """transformers' Gemma2Model, of which it gives the `last_hidden_state`."""

    config: Config

    @nn.compact
    def __call__(self, ids: TextIds, mask: TextMask) -> TextTokens:
        """The states of the tokens, after the final norm, zero at padding.

        mask: of each row the valid tokens, which are its first ones and at least one. Raises
        UserError for more tokens than the window.
        """
        c, length = self.config, ids.shape[1]
        if length > c.window:
            raise UserError(
                f"a text of {length} tokens is longer than the text encoder's window of "
                f"{c.window}: shorten it"
            )
        h = decoder.embedded(self, ids)
        h *= jnp.asarray(math.sqrt(c.width), c.dtype)  # rounded to that dtype, as published
        h = decoder.through_layers(self, Block, h, mask)
        return jnp.where(mask[..., None], RMSNorm(c, name="norm")(h), 0)


def table(config: Config) -> names.NameTable:
    """The names in SANA's folders; Gemma's own folder has "model." before them."""
    layer = (
        ("input_layernorm.weight", "attention_norm/scale", "same"),
        *decoder.attention_names(bias=False),
        ("post_attention_layernorm.weight", "attention_out_norm/scale", "same"),
        ("pre_feedforward_layernorm.weight", "mlp_norm/scale", "same"),
        *decoder.MLP_NAMES,
        ("post_feedforward_layernorm.weight", "mlp_out_norm/scale", "same"),
    )
    return names.NameTable(
        rules=(
            names.Rule("embed_tokens.weight", "embedding"),
            *names.stack("layers", layer, "layers", config.layers),
            names.Rule("norm.weight", "norm/scale"),
        ),
        prefixes=("model.",),
        carried=(r"lm_head\.weight",),
    )

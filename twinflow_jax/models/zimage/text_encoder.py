"""Z-Image's text encoder: the layers of Qwen3-4B but the last, whose input the image model reads.

That is the residual stream itself, without the final norm: neither that norm nor the last layer
is here, and their tensors are only kept for export.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from twinflow_jax.arrays import TextIds, TextMask, TextTokens
from twinflow_jax.models import decoder, names, settings

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3Model")

# Of a published config: our field and the default of transformers' Qwen3Config.
NUMBERS = {
    "vocab_size": ("vocab", 151936),
    "hidden_size": ("width", 4096),
    "num_hidden_layers": ("layers", 32),
    "num_attention_heads": ("heads", 32),
    "num_key_value_heads": ("kv_heads", 32),
    "head_dim": ("head_dim", 128),
    "intermediate_size": ("hidden", 22016),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 1e4),
}
ONLY = {
    "model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": False,
    "attention_bias": False,
}
# What else may stand there: checked below, or without effect on the states of a text.
OTHERS = (
    "architectures", "layer_types", "max_position_embeddings", "max_window_layers",
    "sliding_window",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Qwen3-4B's. layers: that are computed, one less than published. dtype: of the computation,
    "float32" or "bfloat16"."""

    vocab: int = 151936
    width: int = 2560
    layers: int = 35
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 9728
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    dtype: str = "float32"

    bias, qk_norm = False, True

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
        if not mistyped and values["layers"] < 2:
            problems.append("num_hidden_layers is 1, and the last layer is not read")
        if set(config.get("layer_types") or ()) - {"full_attention"}:
            problems.append("layer_types has others than 'full_attention'")
        what = "this config.json is not of Z-Image's text encoder"
        settings.refuse(what, problems + mistyped)
        return cls(**values | {"layers": values["layers"] - 1})


class TextEncoder(nn.Module):
    """transformers' Qwen3ForCausalLM, of which it gives `hidden_states[-2]`."""

    config: Config

    @nn.compact
    def __call__(self, ids: TextIds, mask: TextMask) -> TextTokens:
        """The states of the tokens, zero at padding.

        mask: of each row the valid tokens, which are its first ones and at least one.
        """
        h = decoder.embedded(self, ids)
        h = decoder.through_layers(self, decoder.QwenBlock, h, mask)
        return jnp.where(mask[..., None], h, 0)


def table(config: Config) -> names.NameTable:
    """The published names, with those of the whole language model before its layers."""
    return names.NameTable(
        rules=(
            names.Rule("model.embed_tokens.weight", "embedding"),
            *names.stack("model.layers", decoder.qwen_names(config), "layers", config.layers),
        ),
        renames=((r"^(embed_tokens|layers|norm)\.", r"model.\1."),),
        carried=(
            rf"model\.layers\.{config.layers}\..*", r"model\.norm\.weight", r"lm_head\.weight",
        ),
    )

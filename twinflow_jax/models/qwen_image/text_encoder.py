"""Qwen-Image's text encoder: the language tower of Qwen2.5-VL-7B, which is all that text needs.

Its last state, after the final norm, is what the image model reads; so there is no vision tower
and no output head here, and rotary positions, which are three equal axes for text, are plain.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from twinflow_jax.arrays import TextIds, TextMask, TextTokens
from twinflow_jax.models import decoder, names, settings
from twinflow_jax.models.projections import rms_norm

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"

# Of a published config: our field and the default of transformers' Qwen2_5_VLTextConfig.
NUMBERS = {
    "vocab_size": ("vocab", 152064),
    "hidden_size": ("width", 8192),
    "num_hidden_layers": ("layers", 80),
    "num_attention_heads": ("heads", 64),
    "num_key_value_heads": ("kv_heads", 8),
    "intermediate_size": ("hidden", 29568),
    "rms_norm_eps": ("norm_eps", 1e-5),
    "rope_theta": ("rope_theta", 1e6),
}
# Keys with the only value that we compute: of the whole, and of its language tower.
WHOLE = {"model_type": "qwen2_5_vl", "architectures": [ARCHITECTURE]}
ONLY = {"hidden_act": "silu", "use_sliding_window": False}
# What else may stand there: checked below, or without effect on the states of a text.
OTHERS = (
    *WHOLE, "head_dim", "layer_types", "max_position_embeddings", "max_window_layers",
    "mrope_section", "sliding_window", "text_config", "vision_config",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The published Qwen2.5-VL-7B. dtype: of the computation, "float32" or "bfloat16"."""

    vocab: int = 152064
    width: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    hidden: int = 18944
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    dtype: str = "float32"

    bias, qk_norm = True, False

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """As `family.PublishedConfig` says; from a flat one, or one with a "text_config"."""
        text = config.get("text_config") or config
        if text.get("num_key_value_heads", 8) is None:  # as many as there are heads
            text = text | {"num_key_value_heads": text.get("num_attention_heads", 64)}
        values, mistyped, problems = decoder.published(
            {**config, **text}, NUMBERS, ONLY, OTHERS, ("default", "mrope")
        )
        problems += settings.other_values(config, WHOLE)
        if not mistyped:
            values["head_dim"] = values["width"] // values["heads"]
            if values["width"] % (2 * values["heads"]):
                problems.append("hidden_size is no even multiple of num_attention_heads")
            if text.get("head_dim") not in (None, values["head_dim"]):
                problems.append("head_dim is not hidden_size / num_attention_heads")
        if set(text.get("layer_types") or ()) - {"full_attention"}:
            problems.append("layer_types has others than 'full_attention'")
        what = "this config.json is not of Qwen-Image's text encoder"
        settings.refuse(what, problems + mistyped)
        return cls(**values)


class TextEncoder(nn.Module):
    """The language tower of transformers' Qwen2_5_VLForConditionalGeneration.

    Gives its `hidden_states[-1]`, which is after the final norm.
    """

    config: Config

    @nn.compact
    def __call__(self, ids: TextIds, mask: TextMask) -> TextTokens:
        """The states of the tokens, zero at padding.

        mask: of each row the valid tokens, which are its first ones and at least one.
        """
        c = self.config
        h = decoder.through_layers(self, decoder.QwenBlock, decoder.embedded(self, ids), mask)
        return jnp.where(mask[..., None], rms_norm(c.norm_eps, c.dtype, "norm")(h), 0)


def table(config: Config) -> names.NameTable:
    """The names in the published folder; newer transformers spell them with more parts."""
    return names.NameTable(
        rules=(
            names.Rule("model.embed_tokens.weight", "embedding"),
            *names.stack("model.layers", decoder.qwen_names(config), "layers", config.layers),
            names.Rule("model.norm.weight", "norm/scale"),
        ),
        renames=((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
        carried=(r"visual\..*", r"lm_head\.weight"),
    )

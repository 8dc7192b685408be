"""OpenUni's text encoder: InternVL3-2B's language model reads a prompt and, after it, learned
queries, whose states a connector turns into the tokens of SANA.

Of InternVL3 only the language model is here; its vision has no part in drawing from text.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.arrays import TextIds, TextMask
from twinflow_jax.models import decoder, names, settings
from twinflow_jax.models.axes import init_of, rows
from twinflow_jax.models.openuni.prompt import QUERIES
from twinflow_jax.models.projections import dense, rms_norm
from twinflow_jax.models.stack import run_layers

ARCHITECTURE = "OpenUniTextEncoder"  # ours: nobody publishes it in one folder

# Of "llm_config", as InternVL3's config.json has it: our field and the default of transformers'
# Qwen2Config.
NUMBERS = {
    "vocab_size": ("vocab", 151936),
    "hidden_size": ("width", 4096),
    "num_hidden_layers": ("layers", 32),
    "num_attention_heads": ("heads", 32),
    "num_key_value_heads": ("kv_heads", 32),
    "intermediate_size": ("hidden", 22016),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 1e4),
}
ONLY = {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False}
# Without effect on the states of a text: dynamic positions are plain ones up to the longest text.
OTHERS = ("architectures", "factor", "max_position_embeddings", "max_window_layers",
          "sliding_window")

# Of "connector", with the values of OpenUni's published configurations.
CONNECTOR = {
    "num_hidden_layers": ("layers", 6),
    "num_attention_heads": ("heads", 24),
    "intermediate_size": ("hidden", 8960),
}
CONNECTOR_ONLY = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
KEYS = ("architectures", "llm_config", "connector", "num_queries", "caption_channels")


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Of OpenUni-L's connector; as wide as the language model."""

    layers: int = 6
    heads: int = 24
    hidden: int = 8960

    norm_eps = 1e-6


@dataclasses.dataclass(frozen=True)
class Config:
    """OpenUni-L's, with InternVL3-2B. out: channels of the tokens. dtype: of the computation,
    "float32" or "bfloat16"."""

    vocab: int = 151674
    width: int = 1536
    layers: int = 28
    heads: int = 12
    kv_heads: int = 2
    hidden: int = 8960
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    connector: ConnectorConfig = ConnectorConfig()
    out: int = 2304
    dtype: str = "float32"

    bias, qk_norm = True, False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @classmethod
    def from_published(cls, config: dict[str, Any]) -> "Config":
        """As `family.PublishedConfig` says, of what tools/openuni.py writes."""
        problems = [f"{key} is not known" for key in sorted(config.keys() - set(KEYS))]
        part = lambda key: config.get(key) if isinstance(config.get(key), dict) else {}
        values, mistyped, found = decoder.published(
            part("llm_config"), NUMBERS, ONLY, OTHERS, ("default", "dynamic")
        )
        inner, also_mistyped, of_connector = settings.published(
            part("connector"), CONNECTOR, CONNECTOR_ONLY, ("hidden_size",)
        )
        problems += found + of_connector
        mistyped += also_mistyped
        if not mistyped and values["width"] % (2 * values["heads"]):
            problems.append("hidden_size is no even multiple of num_attention_heads")
        if not mistyped and values["width"] % inner["heads"]:
            problems.append("hidden_size is no multiple of the connector's num_attention_heads")
        if part("connector").get("hidden_size", values["width"]) != values["width"]:
            problems.append("the connector is not as wide as the language model")
        if config.get("num_queries") != QUERIES:
            problems.append(f"num_queries is {config.get('num_queries')!r}, not {QUERIES}")
        out = config.get("caption_channels")
        if type(out) is not int or out < 1:
            mistyped.append(f"caption_channels is {out!r}, not a number of channels")
        settings.refuse("this config.json is not of OpenUni's text encoder", problems + mistyped)
        return cls(**values, connector=ConnectorConfig(**inner), out=out)


class ConnectorBlock(nn.Module):
    """Attention of all queries to all, then an MLP, each after a norm; `(h,) -> (h, None)`."""

    config: Config

    @nn.compact
    def __call__(self, h: Float[Array, "B Q D"]):
        c, own = self.config, self.config.connector
        c = dataclasses.replace(c, heads=own.heads, hidden=own.hidden, norm_eps=own.norm_eps)
        return decoder.after_norms(c, rows(h), nn.gelu), None  # of tanh


class TextEncoder(nn.Module):
    """OpenUni's language model, queries, connector and projector."""

    config: Config

    @nn.compact
    def __call__(
        self, ids: TextIds, mask: TextMask
    ) -> Float[Array, "B 256 {self.config.out}"]:
        """The tokens that SANA takes.

        mask: of each row the valid tokens, which are its first ones and at least one. The queries
        stand right after them and padding after these: what OpenUni computes with padding between,
        which it masks and does not count.
        """
        c, length = self.config, ids.shape[1]
        init = init_of(nn.initializers.normal(c.width**-0.5), None, "embed")
        queries = self.param("queries", init, (QUERIES, c.width))
        queries = jnp.broadcast_to(queries.astype(c.dtype), (len(ids), QUERIES, c.width))
        h = jnp.concatenate([decoder.embedded(self, ids), queries], axis=1)
        lengths = mask.sum(axis=-1)[:, None]
        place = jnp.arange(length + QUERIES)[None]
        which = jnp.where(place < lengths, place, (length - lengths + place) % (length + QUERIES))
        h = jnp.take_along_axis(h, which[..., None], axis=1)
        h = decoder.through_layers(self, decoder.QwenBlock, h, place < lengths + QUERIES)
        states = jnp.take_along_axis(h, (lengths + jnp.arange(QUERIES)[None])[..., None], axis=1)
        states = rms_norm(c.norm_eps, c.dtype, "norm")(states)
        states = run_layers(
            self, ConnectorBlock, c.connector.layers, "none", states, name="connector"
        )
        return dense(c, c.out, ("embed", None), "projector")(states)


def table(config: Config) -> names.NameTable:
    """The names in OpenUni's checkpoint and, of the language model, in InternVL3's."""
    body, layers = "language_model.model", config.connector.layers
    return names.NameTable(
        rules=(
            names.Rule(f"{body}.embed_tokens.weight", "embedding"),
            *names.stack(f"{body}.layers", decoder.qwen_names(config), "layers", config.layers),
            names.Rule(f"{body}.norm.weight", "norm/scale"),
            names.Rule("meta_queries", "queries"),
            *names.stack("connector.layers", decoder.CLIP_NAMES, "connector", layers),
            *(names.Rule(*each) for each in names.linear("projector", "projector")),
        ),
    )

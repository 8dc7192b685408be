"""The text encoder: all-MiniLM-L6-v2, a small BERT, whose last states the image model reads.

Its pooler, and its mean over tokens as a sentence's embedding, have no part in this.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from twinflow_jax.arrays import Lengths, TextIds, TextMask, TextTokens
from twinflow_jax.errors import UserError
from twinflow_jax.models import decoder, names, settings
from twinflow_jax.models.axes import init_of, rows
from twinflow_jax.models.projections import dense, layer_norm
from twinflow_jax.models.stack import run_layers

ARCHITECTURE = "BertModel"

# Of a published config: our field and the default of transformers' BertConfig.
NUMBERS = {
    "vocab_size": ("vocab", 30522),
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 12),
    "intermediate_size": ("hidden", 3072),
    "max_position_embeddings": ("positions", 512),
    "type_vocab_size": ("types", 2),
    "layer_norm_eps": ("norm_eps", 1e-12),
}
# Keys with the only value that we compute.
ONLY = {
    "model_type": "bert", "architectures": [ARCHITECTURE], "hidden_act": "gelu",
    "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
}
# What else may stand there, without effect on the states of a text.
OTHERS = (
    "attention_probs_dropout_prob", "classifier_dropout", "gradient_checkpointing",
    "hidden_dropout_prob", *decoder.HARMLESS,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The published all-MiniLM-L6-v2. dtype: of the computation, "float32" or "bfloat16".

    positions: the most tokens of a text. types: kinds of tokens, of which the first is used.
    """

    vocab: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    hidden: int = 1536
    positions: int = 512
    types: int = 2
    norm_eps: float = 1e-12
    dtype: str = "float32"

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """As `family.PublishedConfig` says."""
        values, mistyped, problems = settings.published(config, NUMBERS, ONLY, OTHERS)
        if not mistyped and values["width"] % values["heads"]:
            problems.append("hidden_size is no multiple of num_attention_heads")
        settings.refuse("this config.json is not of MiniLM's text encoder", problems + mistyped)
        return cls(**values)


class Block(nn.Module):
    """Attention to all tokens, then an MLP, each before a norm; `(h, lengths) -> (h, None)`."""

    config: Config

    @nn.compact
    def __call__(self, h: TextTokens, lengths: Lengths):
        c, h = self.config, rows(h)
        norm = lambda name: layer_norm(c.norm_eps, c.dtype, name)
        h = norm("attention_norm")(h + decoder.attended(c, h, c.width, lengths=lengths))
        inner = nn.gelu(dense(c, c.hidden, ("embed", "mlp"), "up")(h), approximate=False)
        inner = dense(c, c.width, ("mlp", "embed"), "down")(inner)
        return norm("mlp_norm")(h + inner), None


class TextEncoder(nn.Module):
    """transformers' BertModel, of which it gives the `last_hidden_state`."""

    config: Config

    @nn.compact
    def __call__(self, ids: TextIds, mask: TextMask) -> TextTokens:
        """The states of the tokens, zero at padding.

        mask: of each row the valid tokens, which are its first ones and at least one. Raises
        UserError for more tokens than there are positions.
        """
        c, length = self.config, ids.shape[1]
        if length > c.positions:
            raise UserError(
                f"a text of {length} tokens is longer than the text encoder's {c.positions}: "
                "shorten it"
            )
        init = init_of(nn.initializers.normal(0.02), None, "embed")
        positions = self.param("positions", init, (c.positions, c.width))
        types = self.param("types", init, (c.types, c.width))
        places = (positions[:length] + types[:1]).astype(c.dtype)
        h = decoder.embedded(self, ids) + places[None]
        h = layer_norm(c.norm_eps, c.dtype, "norm")(h)
        h = run_layers(self, Block, c.layers, "none", h, per_row=(mask.sum(axis=-1),))
        return jnp.where(mask[..., None], h, 0)


def table(config: Config) -> names.NameTable:
    """The published names."""
    layer = (
        *names.linear("attention.self.query", "query"),
        *names.linear("attention.self.key", "key"),
        *names.linear("attention.self.value", "value"),
        *names.linear("attention.output.dense", "out"),
        *names.norm("attention.output.LayerNorm", "attention_norm"),
        *names.linear("intermediate.dense", "up"),
        *names.linear("output.dense", "down"),
        *names.norm("output.LayerNorm", "mlp_norm"),
    )
    return names.NameTable(
        rules=(
            names.Rule("embeddings.word_embeddings.weight", "embedding"),
            names.Rule("embeddings.position_embeddings.weight", "positions"),
            names.Rule("embeddings.token_type_embeddings.weight", "types"),
            *(names.Rule(*each) for each in names.norm("embeddings.LayerNorm", "norm")),
            *names.stack("encoder.layer", layer, "layers", config.layers),
        ),
        carried=(r"pooler\.dense\.(weight|bias)", r"embeddings\.position_ids"),
    )

"""CLIP's text encoders, as Stable Diffusion 3 uses them: states before the last layer, and a vector
of the whole text after it."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.arrays import TextIds, TextMask, TextTokens
from twinflow_jax.errors import UserError
from twinflow_jax.models import decoder, names, settings
from twinflow_jax.models.axes import init_of, rows
from twinflow_jax.models.projections import dense, layer_norm
from twinflow_jax.models.stack import run_layers

ARCHITECTURE = "CLIPTextModelWithProjection"

# Of a published config: our field and the default of transformers' CLIPTextConfig.
NUMBERS = {
    "vocab_size": ("vocab", 49408),
    "hidden_size": ("width", 512),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 8),
    "intermediate_size": ("hidden", 2048),
    "max_position_embeddings": ("positions", 77),
    "projection_dim": ("projection", 512),
    "layer_norm_eps": ("norm_eps", 1e-5),
    "hidden_act": ("activation", "quick_gelu"),
}
ONLY = {"model_type": "clip_text_model", "architectures": [ARCHITECTURE]}
OTHERS = ("dropout", "initializer_factor", *decoder.HARMLESS)  # without effect on a text's states
ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}
HIGHEST = 2  # as the last token's id in configs that had it wrong: it is the highest one there is


@dataclasses.dataclass(frozen=True)
class Config:
    """CLIP ViT-L's. activation: one of ACTIVATIONS. positions: the most tokens of a text. end: the
    id of its last token, or HIGHEST. dtype: of the computation, "float32" or "bfloat16"."""

    vocab: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 77
    projection: int = 768
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"
    end: int = HIGHEST
    dtype: str = "float32"

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """As `family.PublishedConfig` says."""
        values, mistyped, problems = settings.published(config, NUMBERS, ONLY, OTHERS)
        if not mistyped and values["width"] % values["heads"]:
            problems.append("hidden_size is no multiple of num_attention_heads")
        if not mistyped and values["layers"] < 2:
            problems.append("num_hidden_layers is 1, and the states before the last are read")
        if values["activation"] not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            problems.append(f"hidden_act is {values['activation']!r}; known are {known}")
        end = config.get("eos_token_id", 49407)
        if type(end) is not int:
            problems.append(f"eos_token_id is {end!r}, not a number")
        settings.refuse("this config.json is not of CLIP's text encoder", problems + mistyped)
        return cls(**values, end=end)


@dataclasses.dataclass(frozen=True)
class ConfigG(Config):
    """OpenCLIP ViT-bigG's."""

    width: int = 1280
    layers: int = 32
    heads: int = 20
    hidden: int = 5120
    projection: int = 1280
    activation: str = "gelu"


class Block(nn.Module):
    """Attention to the tokens before, then an MLP, each after a norm; `(h,) -> (h, None)`."""

    config: Config

    @nn.compact
    def __call__(self, h: TextTokens):
        c = self.config
        return decoder.after_norms(c, rows(h), ACTIVATIONS[c.activation], causal=True), None


class TextEncoder(nn.Module):
    """transformers' CLIPTextModelWithProjection, of which it gives `hidden_states[-2]` and
    `text_embeds`."""

    config: Config

    @nn.compact
    def __call__(
        self, ids: TextIds, mask: TextMask
    ) -> tuple[TextTokens, Float[Array, "B {self.config.projection}"]]:
        """The states of all tokens before the last layer, and the vector of the whole text.

        mask: is not looked at: padding is seen as other tokens are. Raises UserError for more
        tokens than there are positions.
        """
        c, length = self.config, ids.shape[1]
        if length > c.positions:
            raise UserError(
                f"a text of {length} tokens is longer than the text encoder's {c.positions}: "
                "shorten it"
            )
        init = init_of(nn.initializers.normal(0.02), None, "embed")
        positions = self.param("positions", init, (c.positions, c.width))
        h = decoder.embedded(self, ids) + positions[None, :length].astype(c.dtype)
        h = run_layers(self, Block, c.layers - 1, "none", h)
        last = Block(c, name="last")(h)[0]
        last = layer_norm(c.norm_eps, c.dtype, "norm")(last)
        is_end = ids if c.end == HIGHEST else ids == c.end
        whole = last[jnp.arange(len(ids)), is_end.argmax(axis=1)]
        return h, dense(c, c.projection, ("embed", None), "projection", bias=False)(whole)


def table(config: Config) -> names.NameTable:
    """The published names."""
    of, last = "text_model.encoder.layers", config.layers - 1
    single = (
        ("text_model.embeddings.token_embedding.weight", "embedding", "same"),
        ("text_model.embeddings.position_embedding.weight", "positions", "same"),
        *((f"{of}.{last}.{key}", f"last/{path}", how) for key, path, how in decoder.CLIP_NAMES),
        *names.norm("text_model.final_layer_norm", "norm"),
        *names.linear("text_projection", "projection", bias=False),
    )
    return names.NameTable(
        rules=(
            *(names.Rule(*rule) for rule in single),
            *names.stack(of, decoder.CLIP_NAMES, "layers", last),
        ),
        carried=(r"text_model\.embeddings\.position_ids",),
    )

"""OpenUni: SANA, which reads what a language model says of a prompt in place of Gemma's states."""

import dataclasses

import jax.numpy as jnp

from twinflow_jax.keys import option
from twinflow_jax.models import family, sana
from twinflow_jax.models.openuni import prompt, text_encoder, tiny
from twinflow_jax.models.sana import transformer


@dataclasses.dataclass(frozen=True)
class Config(transformer.Config):
    """The published values of SANA-1.6B at 512 pixels."""

    name: str = "openuni"
    layers: int = option(20, "of the transformer", least=1)
    heads: int = option(70, "of attention", least=1)
    cross_heads: int = option(20, "of the attention to the text", least=1)
    cross_head_dim: int = option(112, "channels of such a head", least=1)


def embed(config: text_encoder.Config, params, ids, mask):
    """The tokens (B, 256, D) that stand for prompts, and their mask, which holds them all."""
    tokens = text_encoder.TextEncoder(config).apply({"params": params}, ids, mask)
    return tokens, jnp.ones(tokens.shape[:2], bool)


NETWORKS = sana.NETWORKS | {
    "transformer": dataclasses.replace(sana.NETWORKS["transformer"], config=Config),
    "text_encoder": family.TextNetwork(
        "text_encoder", (text_encoder.ARCHITECTURE,), text_encoder.Config,
        text_encoder.TextEncoder, family.text_inputs, text_encoder.table,
        load_tokenizer=prompt.load_tokenizer, save_tiny_tokenizer=tiny.save_tokenizer,
    ),
}

FAMILY = dataclasses.replace(
    sana.FAMILY, config=Config, text_to_image=dataclasses.replace(
        sana.FAMILY.text_to_image, networks=NETWORKS, tiny=tiny.CONFIGS,
        pipelines=("OpenUniPipeline",), **family.of_one_encoder(prompt.tokenize, embed),
    ),
)

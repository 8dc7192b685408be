"""SANA: its three networks, its prompts and its codec, as one family."""

import jax
import jax.numpy as jnp

from twinflow_jax.errors import UserError
from twinflow_jax.models.family import Family, Network, TextToImage
from twinflow_jax.models.sana import autoencoder, prompt, text_encoder, tiny, transformer

EXPORT_NOTE = """\
The transformer was trained with two times, the present t and the target r: both outputs of its
time embedding are E1(t) + E2(r) (t - r), with E2 under the keys `time_embed_2.*`. diffusers' own
class reports these keys as unexpected and computes E1(t), that is r = t, which is right for
sampling in many steps. One- and few-step sampling tells the network r = 0: use twinflow_jax for
it, or add E2(r) (t - r) to both outputs of the time embedding."""


def _transformer_inputs(config: transformer.Config) -> tuple:
    """Abstract inputs of the smallest image and prompt."""
    x = jax.ShapeDtypeStruct((1, 1, 1, config.latent_channels), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 1, config.text_width), jnp.float32)
    cond = {"tokens": tokens, "mask": jax.ShapeDtypeStruct((1, 1), jnp.bool_)}
    return x, time, time, cond | ({"guidance": time} if config.guidance_embeds else {})


def _text_inputs(config: text_encoder.Config) -> tuple:
    return jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.bool_)


def _image_inputs(config: autoencoder.Config) -> tuple:
    return (jax.ShapeDtypeStruct((1, config.downscale, config.downscale, 3), jnp.float32),)


NETWORKS = {
    "transformer": Network(
        "transformer", ("SanaTransformer2DModel",), transformer.Config, transformer.Transformer,
        _transformer_inputs, transformer.table,
    ),
    "text_encoder": Network(
        "text_encoder", ("Gemma2Model", "Gemma2ForCausalLM"), text_encoder.Config,
        text_encoder.TextEncoder, _text_inputs, text_encoder.table, stem="model",
    ),
    "vae": Network(
        "vae", ("AutoencoderDC",), autoencoder.Config, autoencoder.Autoencoder, _image_inputs,
        autoencoder.table,
    ),
}


def tokenize(tokenizer, prompts, tokens: int | None = None, negative: bool = False):
    """As `prompt.tokenize`; tokens: that the image model takes, which is always the same."""
    if tokens not in (None, prompt.TOKENS):
        raise UserError(f"text of {tokens} tokens is asked for; SANA takes {prompt.TOKENS}")
    return prompt.tokenize(tokenizer, prompts, negative)


def embed(config: text_encoder.Config, params, ids, mask):
    """The prompts' tokens (B, 300, D) and their mask (B, 300)."""
    states = text_encoder.TextEncoder(config).apply({"params": params}, ids, mask)
    return prompt.select(states, mask)


def encode(config: autoencoder.Config, params, images):
    return autoencoder.Autoencoder(config).apply({"params": params}, images, method="encode")


def decode(config: autoencoder.Config, params, latents):
    return autoencoder.Autoencoder(config).apply({"params": params}, latents, method="decode")


FAMILY = Family(
    transformer.Config, transformer.Transformer,
    TextToImage(
        networks=NETWORKS, null_prompt="", negative_prompt="", base_steps=20,
        base_guidance=4.5, export_note=EXPORT_NOTE,
        tiny=tiny.CONFIGS, save_tiny_tokenizer=tiny.save_tokenizer,
        load_tokenizer=prompt.load_tokenizer, tokenize=tokenize, embed=embed, encode=encode,
        decode=decode,
    ),
)

"""Qwen-Image: its three networks, its prompts and its codec, as one family; Qwen-Image-Edit, whose
text encoder sees the pictures, as two."""

import dataclasses

import jax.numpy as jnp

from twinflow_jax.arrays import Latents
from twinflow_jax.models import family
from twinflow_jax.models.qwen_image import (
    autoencoder,
    edit,
    prompt,
    seeing_encoder,
    text_encoder,
    tiny,
    transformer,
)

EXPORT_NOTE = """\
The transformer was trained with two times, the present t and the target r: its time embedding is
E1(t) + E2(r) (t - r), with E2 under the keys `time_text_embed_2.*`. diffusers' own class reports
these keys as unexpected and computes E1(t), that is r = t, which is right for sampling in many
steps. One- and few-step sampling tells the network r = 0: use twinflow_jax for it, or add
E2(r) (t - r) to the time embedding."""

NETWORKS = {
    "transformer": family.Network(
        "transformer", (transformer.CLASS,), transformer.Config,
        transformer.Transformer, family.transformer_inputs, transformer.table,
    ),
    "text_encoder": family.TextNetwork(
        "text_encoder", (text_encoder.ARCHITECTURE,), text_encoder.Config,
        text_encoder.TextEncoder, family.text_inputs, text_encoder.table,
        load_tokenizer=prompt.load_tokenizer, save_tiny_tokenizer=tiny.save_tokenizer,
    ),
    "vae": family.Network(
        "vae", (autoencoder.CLASS,), autoencoder.Config,
        autoencoder.Autoencoder, family.image_inputs, autoencoder.table,
    ),
}


def embed(config: text_encoder.Config, params, ids, mask):
    """The prompts' tokens (B, S, D) and their mask (B, S)."""
    states = text_encoder.TextEncoder(config).apply({"params": params}, ids, mask)
    return prompt.drop_prefix(states, mask)


def norm_preserving(with_cond: Latents, without: Latents, scale: float) -> Latents:
    """Guidance which keeps each 2x2 patch's norm (diffusers' QwenImagePipeline)."""
    guided = without + scale * (with_cond - without)
    rows, height, width, channels = guided.shape
    patches = lambda a: a.reshape(rows, height // 2, 2, width // 2, 2, channels)
    norm = lambda a: jnp.sqrt(jnp.sum(patches(a) ** 2, axis=(2, 4, 5), keepdims=True))
    ratio = norm(with_cond) / jnp.maximum(norm(guided), 1e-12)
    return (patches(guided) * ratio).reshape(guided.shape)


ATTENTION = tuple(f"attn.{name}" for name in (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
))
# Those of the released LoRA configuration.
RELEASED = (
    *ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
)

FAMILY = family.Family(
    transformer.Config, transformer.Transformer,
    family.TextToImage(
        networks=NETWORKS, null_prompt=prompt.NULL_PROMPT, negative_prompt=" ", base_steps=50,
        base_guidance=4.0,
        export_note=EXPORT_NOTE, tiny=tiny.CONFIGS, base_guide=norm_preserving,
        **family.of_one_encoder(prompt.tokenize, embed),
    ),
    adapted={"attention": ATTENTION, "released": RELEASED},
)


@dataclasses.dataclass(frozen=True)
class EditConfig(transformer.Config):
    name: str = "qwen_image_edit"


@dataclasses.dataclass(frozen=True)
class EditPlusConfig(transformer.Config):
    name: str = "qwen_image_edit_plus"


def embed_seen(config: seeing_encoder.Config, params, ids, mask, places, pictures):
    """The tokens (B, S, D) of prompts about pictures, and their mask (B, S)."""
    states = seeing_encoder.SeeingEncoder(config).apply(
        {"params": params}, ids, mask, places, pictures
    )
    return states[:, edit.PREFIX :], mask[:, edit.PREFIX :]


def edit_inputs(config: transformer.Config) -> tuple:
    """As `family.transformer_inputs`, with a source."""
    *inputs, cond = family.transformer_inputs(config)
    return *inputs, cond | {"references": (inputs[0],)}


def _editing(config: type, form: edit.Form, pipeline: str) -> family.Family:
    """Qwen-Image's family with the other text encoder."""
    networks = NETWORKS | {
        "transformer": dataclasses.replace(
            NETWORKS["transformer"], config=config, example=edit_inputs
        ),
        "text_encoder": dataclasses.replace(
            NETWORKS["text_encoder"], config=seeing_encoder.Config,
            module=seeing_encoder.SeeingEncoder, example=seeing_encoder.inputs,
            table=seeing_encoder.table, load_tokenizer=edit.load_tokenizer,
            save_tiny_tokenizer=tiny.save_edit_tokenizer,
        ),
    }
    text = dataclasses.replace(
        FAMILY.text_to_image, networks=networks, null_prompt=edit.NULL_PROMPT,
        tiny=tiny.CONFIGS | {"text_encoder": tiny.SEEING_ENCODER}, editing=form,
        pipelines=(pipeline,), **family.of_one_encoder(edit.without_pictures, embed_seen),
    )
    return dataclasses.replace(FAMILY, config=config, text_to_image=text)


EDIT = _editing(EditConfig, edit.EDIT, "QwenImageEditPipeline")
EDIT_PLUS = _editing(EditPlusConfig, edit.PLUS, "QwenImageEditPlusPipeline")

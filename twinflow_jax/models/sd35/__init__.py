"""Stable Diffusion 3.5 Medium, and 3 Medium: their five networks, prompts and codec, as one family.

The largest text encoder, T5, may be left out, as these models were trained for.
"""

import jax.numpy as jnp

from twinflow_jax.models import autoencoder_kl, family
from twinflow_jax.models.sd35 import clip, prompt, t5, tiny, transformer

EXPORT_NOTE = """\
The transformer was trained with two times, the present t and the target r: its time embedding is
E1(t, pooled) + E2(r, pooled) (t - r), with E2 under the keys `time_text_embed_2.*`. diffusers' own
class reports these keys as unexpected and computes E1(t, pooled), that is r = t, which is right for
sampling in many steps. One- and few-step sampling tells the network r = 0: use twinflow_jax for it,
or add E2(r, pooled) (t - r) to the time embedding."""
T5 = "text_encoder_3"


def _clip(folder: str, config: type, save_tiny_tokenizer) -> family.TextNetwork:
    return family.TextNetwork(
        folder, (clip.ARCHITECTURE,), config, clip.TextEncoder, family.text_inputs, clip.table,
        load_tokenizer=prompt.load_clip, save_tiny_tokenizer=save_tiny_tokenizer,
    )


NETWORKS = {
    "transformer": family.Network(
        "transformer", (transformer.CLASS,), transformer.Config, transformer.Transformer,
        family.transformer_inputs, transformer.table,
    ),
    "text_encoder": _clip("text_encoder", clip.Config, tiny.save_clip_tokenizer),
    "text_encoder_2": _clip("text_encoder_2", clip.ConfigG, tiny.save_second_tokenizer),
    T5: family.TextNetwork(
        T5, (t5.ARCHITECTURE,), t5.Config, t5.TextEncoder, family.text_inputs,
        t5.table, load_tokenizer=prompt.load_t5, save_tiny_tokenizer=tiny.save_t5_tokenizer,
        optional=True,
    ),
    "vae": family.Network(
        "vae", (autoencoder_kl.CLASS,), autoencoder_kl.Config, autoencoder_kl.Autoencoder,
        family.image_inputs, autoencoder_kl.table,
    ),
}


def embed(configs, params, prompts: family.Prompts):
    """The vector of the whole text, CLIP's tokens and T5's as tokens (B, 334, D), and their mask.

    Both CLIPs stand side by side in the channels, with zeros up to T5's width. Without T5 its
    tokens are zeros, of the published width, which are attended to as well.
    """
    def states(name: str, module: type):
        return module(configs[name]).apply({"params": params[name]}, *prompts[name])

    both = [states(name, clip.TextEncoder) for name in ("text_encoder", "text_encoder_2")]
    tokens, whole = (jnp.concatenate(part, axis=-1) for part in zip(*both, strict=True))
    if T5 in configs:
        last = states(T5, t5.TextEncoder)
    else:
        last = jnp.zeros((len(tokens), prompt.LENGTHS[T5], t5.Config.width), tokens.dtype)
    width = last.shape[-1]
    filled = [
        jnp.pad(part, ((0, 0), (0, 0), (0, width - part.shape[-1])))
        for part in (whole[:, None], tokens, last)
    ]
    tokens = jnp.concatenate(filled, axis=1)
    return tokens, jnp.ones(tokens.shape[:2], bool)


JOINT = tuple(f"attn.{name}" for name in (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
))
ATTENTION = (*JOINT, *(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")))
# Those of the released LoRA configuration.
RELEASED = (
    *JOINT, "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
)

FAMILY = family.Family(
    transformer.Config, transformer.Transformer,
    family.TextToImage(
        networks=NETWORKS, null_prompt="Generate an image.", negative_prompt="", base_steps=40,
        base_guidance=4.5, export_note=EXPORT_NOTE, tiny=tiny.CONFIGS, tokenize=prompt.tokenize,
        embed=embed, shifted_twice=True,
    ),
    fixed=("positions",), adapted={"attention": ATTENTION, "released": RELEASED},
    adapter_forms=("diffusers", "peft"),
)

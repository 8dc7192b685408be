"""SANA: its three networks, its prompts and its codec, as one family."""

from twinflow_jax.models import family
from twinflow_jax.models.sana import autoencoder, prompt, text_encoder, tiny, transformer

EXPORT_NOTE = """\
The transformer was trained with two times, the present t and the target r: both outputs of its
time embedding are E1(t) + E2(r) (t - r), with E2 under the keys `time_embed_2.*`. diffusers' own
class reports these keys as unexpected and computes E1(t), that is r = t, which is right for
sampling in many steps. One- and few-step sampling tells the network r = 0: use twinflow_jax for
it, or add E2(r) (t - r) to both outputs of the time embedding."""


def _transformer_inputs(config: transformer.Config) -> tuple:
    *inputs, cond = family.transformer_inputs(config)
    guidance = {"guidance": inputs[1]} if config.guidance_embeds else {}
    return *inputs, cond | guidance


NETWORKS = {
    "transformer": family.Network(
        "transformer", (transformer.CLASS,), transformer.Config, transformer.Transformer,
        _transformer_inputs, transformer.table,
    ),
    "text_encoder": family.TextNetwork(
        "text_encoder", text_encoder.ARCHITECTURES, text_encoder.Config,
        text_encoder.TextEncoder, family.text_inputs, text_encoder.table,
        load_tokenizer=prompt.load_tokenizer, save_tiny_tokenizer=tiny.save_tokenizer,
    ),
    "vae": family.Network(
        "vae", (autoencoder.CLASS,), autoencoder.Config, autoencoder.Autoencoder,
        family.image_inputs, autoencoder.table,
    ),
}


def embed(config: text_encoder.Config, params, ids, mask):
    """The prompts' tokens (B, 300, D) and their mask (B, 300)."""
    states = text_encoder.TextEncoder(config).apply({"params": params}, ids, mask)
    return prompt.select(states, mask)


ATTENTION = tuple(
    f"{attention}.{name}" for attention in ("attn1", "attn2")
    for name in ("to_q", "to_k", "to_v", "to_out.0")
)
# Those of the released LoRA configuration that there are.
RELEASED = (
    *ATTENTION, "time_embed.linear", "timestep_embedder.linear_1", "timestep_embedder.linear_2",
)

FAMILY = family.Family(
    transformer.Config, transformer.Transformer,
    family.TextToImage(
        networks=NETWORKS, null_prompt="", negative_prompt="", base_steps=20,
        base_guidance=4.5, export_note=EXPORT_NOTE, tiny=tiny.CONFIGS,
        **family.of_one_encoder(prompt.tokenize, embed),
    ),
    adapted={"attention": ATTENTION, "released": RELEASED},
    adapter_forms=("diffusers", "peft"),
)

"""Z-Image and Z-Image-Turbo: their three networks, prompts and codec, as one family."""

from twinflow_jax.models import autoencoder_kl, family
from twinflow_jax.models.qwen_image.tiny import save_tokenizer
from twinflow_jax.models.zimage import prompt, text_encoder, tiny, transformer

EXPORT_NOTE = """\
The transformer was trained with two times, the present t and the target r. With u = sign(t) - t
and v = sign(r) - r, sign(0) being 1, its time embedding is E1(|u|) + |v - u| E2(v - u), and
E3(|u|) more where t < 0, which only training asks for; E2 is under the keys `t_embedder_2.*`, E3
under `t_embedder_3.*`. diffusers' own class reports these as unexpected and computes E1(|u|), that
is r = t, which is right for sampling in many steps. One- and few-step sampling tells the network
r = 0: use twinflow_jax for it, or add (t - r) E2(t - r) to the time embedding."""

NETWORKS = {
    "transformer": family.Network(
        "transformer", (transformer.CLASS,), transformer.Config, transformer.Transformer,
        family.transformer_inputs, transformer.table, found=transformer.found,
    ),
    "text_encoder": family.TextNetwork(
        "text_encoder", text_encoder.ARCHITECTURES, text_encoder.Config,
        text_encoder.TextEncoder, family.text_inputs, text_encoder.table,
        load_tokenizer=prompt.load_tokenizer, save_tiny_tokenizer=save_tokenizer,
    ),
    "vae": family.Network(
        "vae", (autoencoder_kl.CLASS,), autoencoder_kl.Config, autoencoder_kl.Autoencoder,
        family.image_inputs, autoencoder_kl.table,
    ),
}


def embed(config: text_encoder.Config, params, ids, mask):
    """The prompts' tokens (B, L, D) and their mask (B, L)."""
    return text_encoder.TextEncoder(config).apply({"params": params}, ids, mask), mask


ATTENTION = tuple(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
MLP = tuple(f"feed_forward.{name}" for name in ("w1", "w2", "w3"))

FAMILY = family.Family(
    transformer.Config, transformer.Transformer,
    family.TextToImage(
        networks=NETWORKS, null_prompt="", negative_prompt="", base_steps=50, base_guidance=4.0,
        export_note=EXPORT_NOTE, tiny=tiny.CONFIGS, no_guidance=0.0,
        distilled={"shift": 3.0}, distilled_steps=8,
        **family.of_one_encoder(prompt.tokenize, embed),
    ),
    adapted={"attention": ATTENTION, "blocks": (*ATTENTION, *MLP)},
    adapter_forms=("diffusers", "peft"),
)

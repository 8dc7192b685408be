"""MiniLM and a small diffusion transformer in pixels: text to image at the size of a laptop.

Only the text encoder is a published network; the transformer is trained from scratch.
"""

from twinflow_jax.models import dit, family
from twinflow_jax.models.minilm_dit import pixels, prompt, text_encoder, tiny, transformer

NETWORKS = {
    "transformer": family.Network(
        "transformer", (), transformer.Config, dit.DiT, family.transformer_inputs
    ),
    "text_encoder": family.TextNetwork(
        "text_encoder", (text_encoder.ARCHITECTURE,), text_encoder.Config,
        text_encoder.TextEncoder, family.text_inputs, text_encoder.table,
        load_tokenizer=prompt.load_tokenizer, save_tiny_tokenizer=tiny.save_tokenizer,
    ),
    "vae": family.Network("vae", (), pixels.Config, pixels.Pixels, family.image_inputs),
}


def embed(config: text_encoder.Config, params, ids, mask):
    """The prompts' tokens (B, L, D) and their mask (B, L)."""
    return text_encoder.TextEncoder(config).apply({"params": params}, ids, mask), mask


FAMILY = family.Family(
    transformer.Config, dit.DiT,
    family.TextToImage(
        networks=NETWORKS, null_prompt="", negative_prompt="", base_steps=32, base_guidance=1.0,
        export_note="", tiny=tiny.CONFIGS, **family.of_one_encoder(prompt.tokenize, embed),
    ),
)

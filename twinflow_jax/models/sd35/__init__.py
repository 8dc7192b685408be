"""Stable Diffusion 3.5 Medium, and 3 Medium."""

from twinflow_jax.models import autoencoder_kl, family
from twinflow_jax.models.sd35 import transformer

NETWORKS = {
    "transformer": family.Network(
        "transformer", (transformer.CLASS,), transformer.Config, transformer.Transformer,
        family.transformer_inputs, transformer.table,
    ),
    "vae": family.Network(
        "vae", (autoencoder_kl.CLASS,), autoencoder_kl.Config, autoencoder_kl.Autoencoder,
        family.image_inputs, autoencoder_kl.table,
    ),
}

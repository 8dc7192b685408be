"""What autoencoders of images share: the ends of encoding and decoding."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.errors import UserError


class Autoencoder(nn.Module):
    """Use as `module.apply({"params": params}, images, method="encode")`.

    A family's own has `to_latents`, from images to normalised latents without the posterior's
    noise, and `to_images`, back.
    """

    config: Any

    def encode(
        self, images: Float[Array, "B H W 3"]
    ) -> Float[Array, "B H/downscale W/downscale latent_channels"]:
        """Normalised latents of images in [-1, 1], in float32.

        Raises UserError for sides that `config.downscale` does not divide.
        """
        height, width = images.shape[1:3]
        downscale = self.config.downscale
        if height % downscale or width % downscale:
            raise UserError(
                f"cannot encode images of {height}x{width}: crop or resize them to multiples of "
                f"{downscale}"
            )
        return self.to_latents(images)

    def decode(
        self, latents: Float[Array, "B h w latent_channels"]
    ) -> Float[Array, "B h*downscale w*downscale 3"]:
        """Images in [-1, 1] of normalised latents, in float32."""
        return jnp.clip(self.to_images(latents).astype(jnp.float32), -1, 1)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """The reconstruction; meets every parameter, for `init`."""
        return self.decode(self.encode(images))

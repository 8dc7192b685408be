"""What autoencoders of images share: the ends of encoding and decoding."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from twinflow_jax.arrays import Images, Latents
from twinflow_jax.errors import UserError


class Autoencoder(nn.Module):
    """Use as `module.apply({"params": params}, images, method="encode")`.

    A family's own has `to_latents`, from images to normalised latents without the posterior's
    noise, and `to_images`, back.
    """

    config: Any

    def encode(self, images: Images) -> Latents:
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

    def decode(self, latents: Latents) -> Images:
        """Images in [-1, 1] of normalised latents, in float32."""
        return jnp.clip(self.to_images(latents).astype(jnp.float32), -1, 1)

    def __call__(self, images: Images) -> Images:
        """The reconstruction; meets every parameter, for `init`."""
        return self.decode(self.encode(images))

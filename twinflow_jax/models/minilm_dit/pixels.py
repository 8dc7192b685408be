"""The autoencoder of a network that draws pixels: there is nothing to encode."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from twinflow_jax.arrays import Images


@dataclasses.dataclass(frozen=True)
class Config:
    """downscale: pixels along a side of a latent position. dtype: that nothing is computed in."""

    downscale: int = 1
    latent_channels: int = 3
    dtype: str = "float32"


class Pixels(nn.Module):
    """Latents are the pixels themselves; no parameters."""

    config: Config

    def encode(self, images: Images) -> Images:
        return images

    def decode(self, latents: Images) -> Images:
        """Within [-1, 1], as images are."""
        return jnp.clip(latents, -1, 1)

    def __call__(self, images: Images) -> Images:
        return self.decode(self.encode(images))

"""The autoencoder of a network that draws pixels: there is nothing to encode."""

import dataclasses

from twinflow_jax.arrays import Images
from twinflow_jax.models import autoencoder


@dataclasses.dataclass(frozen=True)
class Config:
    """downscale: pixels along a side of a latent position. dtype: that nothing is computed in."""

    downscale: int = 1
    latent_channels: int = 3
    dtype: str = "float32"


class Pixels(autoencoder.Autoencoder):
    """Latents are the pixels themselves; no parameters."""

    def to_latents(self, images: Images) -> Images:
        return images

    def to_images(self, latents: Images) -> Images:
        return latents

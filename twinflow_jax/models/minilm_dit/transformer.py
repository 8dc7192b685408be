"""The image model: the small diffusion transformer of `models/dit.py` under text, in pixels."""

import dataclasses

from twinflow_jax.keys import option
from twinflow_jax.models import dit
from twinflow_jax.models.settings import TextSettings


@dataclasses.dataclass(frozen=True)
class Config(dit.Config, TextSettings):
    """Family `dit` under text."""

    name: str = "minilm_dit"
    sample_shape: tuple[int, ...] = (32, 32, 3)
    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    num_classes: int = 0
    text_width: int = option(384, "of the text encoder's tokens", least=1)

    latent_channels = 3  # of a pixel

"""The image model: the small diffusion transformer of `models/dit.py` under text, in pixels."""

import dataclasses

from twinflow_jax.keys import option
from twinflow_jax.models import dit, settings


@dataclasses.dataclass(frozen=True)
class Config(dit.Config):
    """Family `dit` under text."""

    name: str = "minilm_dit"
    sample_shape: tuple[int, ...] = (32, 32, 3)
    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    num_classes: int = 0
    text_width: int = option(384, "of the text encoder's tokens", least=1)

    def __post_init__(self):
        super().__post_init__()
        settings.refuse("model 'minilm_dit'", settings.not_latents_from_text(self))

    @property
    def any_size(self) -> bool:
        """Whether samples of other sizes than `sample_shape` can be drawn."""
        return True

    @property
    def latent_channels(self) -> int:
        """Of a pixel."""
        return 3

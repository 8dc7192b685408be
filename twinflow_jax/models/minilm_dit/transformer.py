"""The image model: the small diffusion transformer of `models/dit.py` under text, in pixels."""

import dataclasses

from twinflow_jax.models import dit, settings


@dataclasses.dataclass(frozen=True)
class Config(dit.Config):
    """text_width: of the text encoder's tokens. The other fields are those of family `dit`."""

    name: str = "minilm_dit"
    sample_shape: tuple[int, ...] = (32, 32, 3)
    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    num_classes: int = 0
    text_width: int = 384

    def __post_init__(self):
        sizes = ("patch", "width", "depth", "heads", "text_width")
        problems = settings.not_positive(self, sizes) + settings.not_latents_from_text(self)
        settings.refuse("model 'minilm_dit'", problems)
        super().__post_init__()

    @property
    def any_size(self) -> bool:
        """Whether samples of other sizes than `sample_shape` can be drawn."""
        return True

    @property
    def latent_channels(self) -> int:
        """Of a pixel."""
        return 3

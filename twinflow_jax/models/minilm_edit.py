"""Edits at the size of a laptop: Qwen-Image's transformer in pixels, under MiniLM's text.

The text encoder does not see the pictures; the transformer does, as Qwen-Image-Edit's. It is
trained from scratch.
"""

import dataclasses

import numpy as np

from twinflow_jax.arrays import Maps, Times
from twinflow_jax.models import dit, family, minilm_dit
from twinflow_jax.models.minilm_dit import prompt
from twinflow_jax.models.qwen_image import edit, edit_inputs, transformer


@dataclasses.dataclass(frozen=True)
class Config(transformer.Config):
    """Family `qwen_image`, small, with sources that are modulated as at t = 0."""

    name: str = "minilm_edit"
    sample_shape: tuple[int, ...] = (32, 32, 3)
    layers: int = 6
    heads: int = 6
    head_dim: int = 32
    latent_channels: int = 3
    patch: int = 4
    text_width: int = 384
    rope_axes: tuple[int, int, int] = (8, 12, 12)
    zero_cond_t: bool = True


class Painter(transformer.Transformer):
    """The transformer, whose output is an estimate of the picture."""

    def __call__(self, x_t: Maps, t: Times, r: Times, cond: dict) -> Maps:
        return dit.velocity_to(super().__call__(x_t, t, r, cond), x_t, t)


class Unseen(edit.Form):
    """One picture, which the text encoder does not see."""

    def seen(self, config, processor, picture):
        return np.zeros((1, 1, 3), np.float32)

    def tokenize(self, tokenizer, config, prompts, seen, tokens=None, negative=False):
        return prompt.tokenize(tokenizer, prompts, tokens, negative)

    def shown(self, config, ids, seen):
        return 0


TEXT = minilm_dit.FAMILY.text_to_image
TRANSFORMER = dataclasses.replace(
    TEXT.networks["transformer"], config=Config, module=Painter,
    example=edit_inputs,
)
FAMILY = dataclasses.replace(
    minilm_dit.FAMILY, config=Config, module=Painter,
    text_to_image=dataclasses.replace(
        TEXT, networks=TEXT.networks | {"transformer": TRANSFORMER},
        null_prompt=edit.NULL_PROMPT, pipelines=("minilm_edit",),
        **family.of_one_encoder(edit.without_pictures, minilm_dit.embed),
        editing=Unseen(looked=0, most=1, numbered=False, last=False, area=32 * 32),
    ),
)

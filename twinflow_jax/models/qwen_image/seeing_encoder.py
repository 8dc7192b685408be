"""Qwen-Image-Edit's text encoder: all of Qwen2.5-VL-7B, which sees the pictures that a prompt
names."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from twinflow_jax.arrays import TextIds, TextMask, TextTokens
from twinflow_jax.errors import UserError
from twinflow_jax.models import decoder, names
from twinflow_jax.models.projections import rms_norm
from twinflow_jax.models.qwen_image import text_encoder, vision

Tower = vision.Config


@dataclasses.dataclass(frozen=True)
class Config(text_encoder.Config):
    """The published Qwen2.5-VL-7B. sections: how many channels of half a head are rotated by a
    token's frame, row and column. image_token: the id that stands for a token of a picture."""

    vision: Tower = Tower()
    sections: tuple[int, int, int] = (16, 24, 24)
    image_token: int = 151655

    def __post_init__(self):
        object.__setattr__(self, "vision", dataclasses.replace(self.vision, dtype=self.dtype))

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """As `family.PublishedConfig` says."""
        language = text_encoder.Config.from_published(config)
        text = config.get("text_config") or config
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        sections = tuple(rope.get("mrope_section") or ())
        if len(sections) != 3 or sum(sections) != language.head_dim // 2:
            raise UserError(
                f"config.json of the text encoder: mrope_section is {list(sections)}, not three "
                f"numbers that add up to half a head, {language.head_dim // 2}"
            )
        tower = Tower.from_published(config.get("vision_config") or {})
        if tower.out != language.width:
            raise UserError(
                f"config.json of the text encoder: its vision tower makes tokens of width "
                f"{tower.out}, its language tower has {language.width}"
            )
        return cls(
            **dataclasses.asdict(language), vision=tower, sections=sections,
            image_token=config.get("image_token_id", cls.image_token),
        )


class SeeingEncoder(nn.Module):
    """transformers' Qwen2_5_VLForConditionalGeneration without its head.

    Gives its `hidden_states[-1]`, which is after the final norm. It has to be told its
    `mm_token_type_ids`; without, transformers 5 computes positions as if there were no pictures.
    """

    config: Config

    @nn.compact
    def __call__(
        self, ids: TextIds, mask: TextMask, places: Int[Array, "B L 3"],
        pictures: tuple[Float[Array, "B _ _ 3"], ...],
    ) -> TextTokens:
        """The states of the tokens, zero at padding.

        mask: of each row the valid tokens, which are its first ones and at least one. places:
        frame, row and column of each token (`edit.places`). pictures: those that a row's image
        tokens stand for, in their order (`edit.pixels`).
        """
        c = self.config
        h, seen = decoder.embedded(self, ids), vision.tokens(self, pictures)
        is_seen = ids == c.image_token
        which = jnp.clip(jnp.cumsum(is_seen, axis=1) - 1, 0, seen.shape[1] - 1)
        h = jnp.where(is_seen[..., None], jnp.take_along_axis(seen, which[..., None], axis=1), h)
        axis = np.repeat(np.arange(3), c.sections)
        angles = places[..., axis].astype(jnp.float32) * decoder.frequencies(c)[None, None]
        h = decoder.through_layers(self, decoder.QwenBlock, h, mask, angles)
        return jnp.where(mask[..., None], rms_norm(c.norm_eps, c.dtype, "norm")(h), 0)


def inputs(config: Config) -> tuple:
    """(ids, mask, places, pictures), abstract, of a prompt of one token and its picture."""
    unit = config.vision.unit
    shape = jax.ShapeDtypeStruct
    return (
        shape((1, 1), "int32"), shape((1, 1), "bool"), shape((1, 1, 3), "int32"),
        (shape((1, unit, unit, 3), "float32"),),
    )


def table(config: Config) -> names.NameTable:
    """The names in the published folder; newer transformers spell them with more parts."""
    language = text_encoder.table(config)
    return dataclasses.replace(
        language, rules=(*language.rules, *vision.rules(config.vision)),
        carried=(r"lm_head\.weight",),
    )

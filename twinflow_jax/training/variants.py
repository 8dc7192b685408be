"""Variants of a config file, and what the configs of text-to-image families have in common."""

import dataclasses
from collections.abc import Callable

import ml_collections

from twinflow_jax import models
from twinflow_jax.errors import UserError

PROMPTS = (  # of the pictures made while training
    "A red fox in fresh snow, close-up, morning light",
    "Two old men playing chess in a park, oil painting",
    "A bowl of ramen, seen from above, on a dark wooden table",
)


def choose(
    variant: str, **variants: Callable[[], ml_collections.ConfigDict]
) -> ml_collections.ConfigDict:
    """The config that the function of that name makes.

    Raises:
      UserError: there is none of that name.
    """
    if variant not in variants:
        raise UserError(f"no variant {variant!r}; choose from {', '.join(variants)}")
    return variants[variant]()


def shrink(
    config: ml_collections.ConfigDict, sample_shape: tuple[int, int, int], text_tokens: int
) -> ml_collections.ConfigDict:
    """The config with its family's small random networks, which two CPU cores train in minutes.

    sample_shape: of the latents. text_tokens: of each caption.
    """
    family = models.FAMILIES[config.model.name].text_to_image
    network = family.networks["transformer"]
    settings = network.config()
    if network.published:
        settings = network.config.from_published(family.tiny["transformer"])
    config.pipeline = "random"
    config.data.update(name="digits", records=(), batch_size=16, text_tokens=text_tokens)
    config.model = dataclasses.asdict(settings) | {"sample_shape": sample_shape, "remat": "full"}
    config.optimizer.learning_rate = 1e-3
    config.train.update(
        steps=60, init_from="", condition_dropout=0.1, sample_every=30, checkpoint_every=30
    )
    config.sample.update(steps=(1, 2), columns=4)
    return config

"""Variants of a config file, and what the configs of text-to-image families have in common."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import ml_collections

from twinflow_jax import config as configs
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


def lora(
    file: pathlib.Path, variant: str, **variants: Callable[[], ml_collections.ConfigDict]
) -> ml_collections.ConfigDict:
    """Adapters of the network that a text-to-image config trains whole, as released for LoRA.

    variant: order2, order1, tiny (of order 2), or one of `variants`.
    Raises:
      UserError: there is none of that name.
    """
    def released(order: int) -> ml_collections.ConfigDict:
        config = adapted(str(file), order)
        config.optimizer.learning_rate, config.train.steps = 1e-4, 7000
        return config

    # A random network is zero before its last projection learns: all have adapters.
    tiny = functools.partial(adapted, f"{file}:tiny", 2, rank=4, targets=("all",))
    orders = {f"order{order}": functools.partial(released, order) for order in (2, 1)}
    return choose(variant, **orders, tiny=tiny, **variants)


def adapted(
    path: str, order: int, rank: int = 64, targets: tuple[str, ...] = ("released",)
) -> ml_collections.ConfigDict:
    """The config of a path with adapters in place of all weights.

    order: 2, where averaged adapters are the teacher, or 1, where the base is; its any_step rows
    jump to 0, since others of one t - r / 2 could not be told apart.
    """
    config = configs.load(path)
    config.adapter.update(rank=rank, targets=targets)
    if order == 1:
        config.objective.update(
            order=1, teacher_decay=1.0, guidance=4.0, target_time="zero"
        )
    with config.unlocked():
        config.model.time_conditioning = "half_r"
    config.optimizer.update(name="adamw", betas=(0.9, 0.99), clip_norm=1.0)
    config.train.weights = "bfloat16"
    return config


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

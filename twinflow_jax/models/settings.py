"""Checks of configs, ours and published ones: phrases that one error joins.

Each function returns what is wrong, nothing where all is well; `refuse` raises them together, so
that somebody who has several things to put right learns of all at once.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from twinflow_jax import keys
from twinflow_jax.errors import UserError
from twinflow_jax.keys import option
from twinflow_jax.models import remat

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Settings(keys.Part):
    """What every velocity network's Config has; a family derives from it."""

    section: ClassVar[str] = "model"

    name: str = option("", "the family")
    sample_shape: tuple[int, ...] = option(
        (), "of one sample, channels last; of text-to-image networks: latents", least=1
    )
    num_classes: int = option(0, "that samples are conditioned on; 0 is none", least=0)


@dataclasses.dataclass(frozen=True)
class LayeredSettings(Settings):
    """Of a network of stacked layers, which a mesh may bring their weights."""

    dtype: str = option(
        "float32", "that layers compute in; norms and softmax are float32", choices=DTYPES
    )
    remat: str = option(
        "none", "which activations of a layer stay for the backward pass",
        choices=tuple(remat.POLICIES),
    )


def refuse(what: str, problems: list[str]) -> None:
    """Raises UserError where there are any; what: the thing that has them."""
    if problems:
        raise UserError(f"{what}: {'; '.join(problems)}")


def not_positive(config, names: Iterable[str]) -> list[str]:
    """Which of a config's fields are below 1."""
    return [
        f"{name} is {getattr(config, name)}, but must be positive"
        for name in names if getattr(config, name) < 1
    ]


def not_latents_from_text(config) -> list[str]:
    """What keeps a transformer's config from computing latents under text."""
    problems, shape, patch = [], config.sample_shape, max(config.patch, 1)
    whole = len(shape) == 3 and min(shape) > 0 and not (shape[0] % patch or shape[1] % patch)
    if not whole or shape[-1] != config.latent_channels:
        sides = f", height and width divisible by {patch}" if patch > 1 else ""
        problems.append(
            f"sample_shape {shape} must be (height, width, {config.latent_channels}){sides}"
        )
    if config.num_classes:
        problems.append("num_classes must be 0: the condition is text")
    return problems


def not_numbers(values: Mapping[str, Any]) -> list[str]:
    """Which of a config's values to be are no positive numbers."""
    return [
        f"{name} is {value!r}, not a positive number"
        for name, value in values.items() if not isinstance(value, int | float) or value <= 0
    ]


def other(key: str, value: Any, expected: Any) -> list[str]:
    """Whether a value in a config.json, such as its class, is another one."""
    return [f"{key} is {value}, not {expected}"] if value != expected else []


def unknown(keys: Iterable[str], known: Iterable[str]) -> list[str]:
    """The keys of a config.json that are none of `known`; those with "_" are its writer's own."""
    left = sorted(key for key in set(keys) - set(known) if not key.startswith("_"))
    return [f"unknown settings {', '.join(left)}"] if left else []


def other_values(config: Mapping[str, Any], only: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json with another value than the only one that we compute."""
    return [
        f"{key} is {config[key]!r}, but only {value!r} is supported"
        for key, value in only.items() if config.get(key, value) != value
    ]


def fields(
    config: Mapping[str, Any], table: Mapping[str, tuple[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Our fields from a config.json, and which of its keys have a value of another type.

    table: of each key our field and the published class's default, which stands in for a key
    that is missing and has the type that is right; where this is float, int is right too. Lists
    become tuples.
    """
    values, problems = {}, []
    for key, (field, default) in table.items():
        value = config.get(key, default)
        values[field] = tuple(value) if isinstance(value, list) else value
        kinds = (float, int) if isinstance(default, float) else (type(default),)
        if type(values[field]) not in kinds:
            problems.append(f"{key} is {value!r}, not of type {kinds[0].__name__}")
    return values, problems

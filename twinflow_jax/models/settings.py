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
from twinflow_jax.models import conditioning, remat

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Settings(keys.Part):
    """What every velocity network's Config has; a family derives from it.

    Below are also the answers of a plain network to what others ask of each; one that is otherwise
    has a key or a constant of that name. dtype: of computation. heads: that a mesh's tensor axis
    may split, 0 for none. patch: pixels or latents of a token along each side. any_size: whether
    it takes samples of other sizes than sample_shape. splits_tokens: whether a mesh's context axis
    has something to split.
    """

    section: ClassVar[str] = "model"

    dtype = "float32"  # without types, or these would be keys
    remat = "none"
    heads = 0
    patch = 1
    any_size = False
    splits_tokens = False

    name: str = option("", "the family")
    sample_shape: tuple[int, ...] = option(
        (), "of one sample, channels last; of text-to-image networks: latents", least=1
    )
    num_classes: int = option(
        0, "that samples are conditioned on; 0 is none", least=0, most=10**6
    )


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
    time_conditioning: str = option(
        "second_embedder", "how the target time r is seen: E1(t) + (t - r) E2(r), in the dits "
        "E1(t) + E2(t - r); half_r: E1(t - r / 2); gated: E1(t) + r E2(r), E2 zero at first",
        choices=tuple(conditioning.TIMES),
    )

    @property
    def times(self) -> conditioning.TimeConditioning:
        return conditioning.TIMES[self.time_conditioning]


@dataclasses.dataclass(frozen=True)
class TextSettings(LayeredSettings):
    """Of a network that draws latents under text.

    It also has text_width, of the text's tokens, and latent_channels. `problems` is what to extend.
    """

    any_size = True

    def problems(self) -> list[str]:
        """What keeps it from computing latents under text."""
        found, shape, patch = [], self.sample_shape, self.patch
        whole = len(shape) == 3 and not (shape[0] % patch or shape[1] % patch)
        if not whole or shape[-1] != self.latent_channels:
            sides = f", height and width divisible by {patch}" if patch > 1 else ""
            found.append(
                f"sample_shape {shape} must be (height, width, {self.latent_channels}){sides}"
            )
        if self.num_classes:
            found.append("num_classes must be 0: the condition is text")
        return found

    def __post_init__(self):
        super().__post_init__()
        refuse(f"model {self.name!r}", self.problems())


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


def other_values(config: Mapping[str, Any], only: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json with another value than the only one that we compute.

    A class may stand there as its trainer's wrapper.
    """
    plain = lambda value: value.removesuffix("Wrapper") if isinstance(value, str) else value
    return [
        f"{key} is {config[key]!r}, but only {value!r} is supported"
        for key, value in only.items() if plain(config.get(key, value)) != value
    ]


def published(
    config: Mapping[str, Any], table: Mapping[str, tuple[str, Any]],
    only: Mapping[str, Any], others: Iterable[str] = (),
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Our fields from a config.json; which of its keys have no such value; what else is wrong.

    table: of each key our field and the published class's default, which stands in for a key
    that is missing and has the type that is right; where this is float, int is right too, and a
    number is positive. Lists become tuples. only: keys that may have this value alone. others:
    keys that are checked elsewhere, or without effect. Those with "_" are the writer's own, and
    numbers of tokens are the tokenizer's.
    """
    values, mistyped = {}, []
    for key, (field, default) in table.items():
        value = config.get(key, default)
        values[field] = tuple(value) if isinstance(value, list) else value
        kinds = (float, int) if isinstance(default, float) else (type(default),)
        is_number = kinds[-1] is int
        if type(values[field]) not in kinds or (is_number and value <= 0):
            sign = "positive " if is_number else ""
            mistyped.append(f"{key} is {value!r}, not a {sign}{kinds[0].__name__}")
    left = sorted(
        key for key in config.keys() - {*table, *only, *others}
        if not key.startswith("_") and not key.endswith("_token_id")
    )
    problems = [f"unknown settings {', '.join(left)}"] if left else []
    return values, mistyped, problems + other_values(config, only)

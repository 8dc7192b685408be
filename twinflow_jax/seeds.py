"""Seeds of 64 bits, as other tools have them, in every verb."""

import re
from typing import Any

import numpy as np

from twinflow_jax.errors import UserError

LARGEST = 2**64 - 1


def parse(text: str) -> int:
    """A seed of a command line.

    Raises:
      UserError: it is none.
    """
    return check(int(text) if re.fullmatch(r"\s*[+-]?\d+\s*", text) else text, "the seed")


def check(seed, name: str) -> int:
    """The same seed.

    Raises:
      UserError: it is none; names where it is from.
    """
    if type(seed) is not int or not 0 <= seed <= LARGEST:
        raise UserError(f"{name} is {seed!r}; give a whole number from 0 to {LARGEST} (2^64 - 1)")
    return seed


def key(seed: int) -> Any:
    """JAX's key of a seed: its two halves, as JAX has it where it computes with 64 bits.

    Elsewhere JAX cuts a seed to its lower half without a word.
    """
    import jax  # slow, and command lines only parse

    if seed < 2**32:
        return jax.random.key(seed)
    halves = np.array([seed >> 32, seed % 2**32], np.uint32)
    return jax.random.wrap_key_data(halves, impl="threefry2x32")


def initial(seed: int) -> Any:
    """The key of a run's initial weights, which is no step's."""
    import jax

    return jax.random.fold_in(key(seed), 2**31 - 1)

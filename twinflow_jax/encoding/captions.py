"""Captions through a pipeline's text encoder."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from twinflow_jax.encoding.index import Key, Skipped
from twinflow_jax.errors import TextCut
from twinflow_jax.text_to_image import Pipeline


@dataclasses.dataclass
class Tally:
    """Of a file being written: captions that lost their end, and pictures left out."""

    cut: int = 0
    skipped: dict[Key, Skipped] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Captions:
    """embed: what `pipeline.text_encoder` gives. tokens: that captions are padded or cut to, None
    for the family's own lengths."""

    pipeline: Pipeline
    embed: Callable
    tokens: int | None

    @functools.cached_property
    def _tokenizer(self):
        return self.pipeline.tokenizer()

    def __call__(
        self, captions: Sequence[Sequence[str]], tally: Tally
    ) -> list[list[Float[np.ndarray, "_ D"]]]:
        """The valid tokens of each item's captions.

        A caption is padded for itself and goes with others of its padded length, so that it does
        not matter which these are.
        """
        tokenized, groups, found = {}, {}, {}
        for caption in dict.fromkeys(caption for of_one in captions for caption in of_one):
            with warnings.catch_warnings(record=True) as told:  # one that is cut is counted
                warnings.simplefilter("always")
                tokenized[caption] = self.pipeline.family.tokenize(
                    self._tokenizer, [caption], self.tokens
                )
            # Threads that decode pictures may warn of other things meanwhile.
            tally.cut += any(issubclass(warning.category, TextCut) for warning in told)
            groups.setdefault(tokenized[caption][0].shape[1], []).append(caption)
        for _, group in sorted(groups.items()):
            rows = [tokenized[caption] for caption in group]
            ids, mask = (np.concatenate(arrays) for arrays in zip(*rows, strict=True))
            embedded = self.embed(ids, mask)
            valid = (t[m] for t, m in zip(embedded.tokens, embedded.mask, strict=True))
            found |= dict(zip(group, valid, strict=True))
        return [[found[caption] for caption in of_one] for of_one in captions]

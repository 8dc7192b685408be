"""Captions through a pipeline's text encoder."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float

from twinflow_jax.drawing import Pipeline, text
from twinflow_jax.encoding.workspace import ShardReport
from twinflow_jax.errors import TextCut
from twinflow_jax.models.family import lengths


@dataclasses.dataclass(frozen=True)
class Captions:
    """embed: what `text.encoder` gives. tokens: that captions are padded or cut to, None
    for the family's own lengths."""

    pipeline: Pipeline
    embed: Callable
    tokens: int | None

    @functools.cached_property
    def _tokenizers(self):
        return text.tokenizers(self.pipeline)

    def __call__(
        self, captions: Sequence[Sequence[str]], report: ShardReport
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
                    self._tokenizers, [caption], self.tokens
                )
            # Threads that decode pictures may warn of other things meanwhile.
            report.cut += any(issubclass(warning.category, TextCut) for warning in told)
            groups.setdefault(lengths(tokenized[caption]), []).append(caption)
        for _, group in sorted(groups.items()):
            rows = [tokenized[caption] for caption in group]
            embedded = self.embed(jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows))
            valid = (t[m] for t, m in zip(embedded.tokens, embedded.mask, strict=True))
            found |= dict(zip(group, valid, strict=True))
        return [[found[caption] for caption in of_one] for of_one in captions]

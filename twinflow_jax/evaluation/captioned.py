"""A judge of pictures that were drawn from captions, fitted to real pairs of both.

It sees pictures by the features of an independent network, which has no text side. A ridge map
from features to embeddings of captions, fitted to real training pairs, tells which caption a
picture belongs to. Its scores are relative: read them beside those of real pictures.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Float

from twinflow_jax.arrays import Features, Labels
from twinflow_jax.evaluation import features, metrics, projections

DIMENSIONS = 64  # of features in Frechet distances: the covariance of 1,000 samples has full rank
SMALL = 32  # pixels a side of the copies that nearest pictures are looked for in
shrink = jax.jit(functools.partial(features.scaled, side=SMALL))


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """What the judge keeps of pictures: features, and small copies of their pixels."""

    features: Features
    small: Float[np.ndarray, "N side side 3"]

    @classmethod
    def see(
        cls, network: Callable, batches: Iterable[Float[np.ndarray, "_ H W 3"]]
    ) -> "Pictures":
        """Of batches of pictures in [-1, 1]. network: features.Network, or what stands for it."""
        parts = [(network(x), features.batched(shrink, x)) for x in batches]
        return cls(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def spread(self, count: int) -> "Pictures":
        """At most that many of them, evenly taken."""
        rows = np.unique(np.linspace(0, len(self.features) - 1, count).astype(int))
        return Pictures(self.features[rows], self.small[rows])


def embedding(tokens: Sequence[Float[np.ndarray, "_ D"]]) -> Features:
    """Of captions: the mean of each one's tokens, of length 1."""
    return metrics.unit(np.stack([np.asarray(t, np.float64).mean(0) for t in tokens]))


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionJudge:
    """Scores pictures drawn from held-out captions.

    train, captions, embeddings: real training pairs. held_out: one real picture for each of
    the captions that are drawn, targets their embeddings.
    """

    train: Pictures
    captions: Sequence[str]
    embeddings: Float[np.ndarray, "N E"]
    held_out: Pictures
    targets: Float[np.ndarray, "M E"]

    @functools.cached_property
    def _reduced(self) -> projections.Linear:
        return projections.principal(self.train.features, DIMENSIONS)

    @functools.cached_property
    def _to_caption(self) -> projections.Linear:
        x, y = self.train.features, self.embeddings
        return projections.ridges(x, y, [projections.choose_strength(x, y, self.captions)])[0]

    def score(self, drawn: Pictures, owners: Labels) -> dict[str, float]:
        """Scores of pictures, of which each was drawn from the caption in `owners`.

        retrieval: share whose caption is found among all held-out ones. frechet: distance to the
        held-out pictures in the DIMENSIONS principal components of training features. kernel:
        kernel_distance of whole features, times 1000. diversity: mean feature distance between
        pictures of one caption; 0 with one for each. nearest: pixel distance to the nearest
        training picture.
        """
        guessed = self._to_caption(drawn.features)
        several = len(owners) > len(np.unique(owners))
        return self._against_held_out(drawn) | {
            "retrieval": metrics.retrieved(
                guessed, self.targets - self.embeddings.mean(0), owners
            ),
            "diversity": metrics.diversity(drawn.features, owners) if several else 0.0,
            "nearest": metrics.nearest(drawn.small, self.train.small),
        }

    def _against_held_out(self, some: Pictures) -> dict[str, float]:
        reduced, held_out = self._reduced(some.features), self._reduced(self.held_out.features)
        kernel = metrics.kernel_distance(some.features, self.held_out.features)
        return {"frechet": metrics.frechet(reduced, held_out), "kernel": 1000 * kernel}

    def real(self, count: int) -> dict[str, float]:
        """References from real pictures.

        retrieval and nearest are of the held-out pictures; diversity is the mean feature distance
        between any two of them; frechet and kernel are the distances of `count` training
        pictures to them.
        """
        everything = np.zeros(len(self.targets), int)
        references = self.score(self.held_out, np.arange(len(self.targets)))
        return references | self._against_held_out(self.train.spread(count)) | {
            "diversity": metrics.diversity(self.held_out.features, everything),
        }

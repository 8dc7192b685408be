"""A dataset's judge: the classifier trained on its real training split, and real references."""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Float, Int

from twinflow_jax.arrays import Labels
from twinflow_jax.data import Dataset
from twinflow_jax.evaluation import classifier, metrics


def sample_labels(count: int, num_classes: int) -> Int[np.ndarray, "{count}"]:
    """Classes in turn, so that every count has them balanced."""
    return np.arange(count, dtype=np.int32) % num_classes


@dataclasses.dataclass(frozen=True)
class Judge:
    """Scores class-conditional samples against a dataset's held-out images."""

    dataset: Dataset
    network: classifier.Classifier
    params: dict

    @classmethod
    def create(cls, dataset: Dataset) -> "Judge":
        """Loads the dataset's classifier, or trains it (about 20 s on 2 cores)."""
        return cls(dataset, *classifier.load_or_train(dataset))

    @functools.cached_property
    def _apply(self):
        return jax.jit(lambda x: self.network.apply({"params": self.params}, x))

    def _features(self, x: Float[np.ndarray, "N H W C"]):
        logits, features = self._apply(np.asarray(x, np.float32))
        return np.asarray(logits).argmax(-1), np.asarray(features, np.float64)

    @functools.cached_property
    def _held_out(self):
        return self._features(self.dataset.test.x)[1]

    def score(self, x: Float[np.ndarray, "N H W C"], labels: Labels) -> dict[str, float]:
        """Scores of samples in [-1, 1] that were made for `labels`; clamp them first.

        accuracy: share that the classifier gives their label. frechet: distance of features to
        those of the held-out images. diversity: mean feature distance within a class. nearest:
        pixel distance to the nearest training image.
        """
        guessed, features = self._features(x)
        return {
            "accuracy": float((guessed == labels).mean()),
            "frechet": metrics.frechet(features, self._held_out),
            "diversity": metrics.diversity(features, labels),
            "nearest": metrics.nearest(x, self.dataset.train.x),
        }

    @functools.cached_property
    def real(self) -> dict[str, float]:
        """The same scores for real images: the floor and the references.

        accuracy, diversity and nearest are of the held-out images; frechet is the training
        images' distance to them.
        """
        test = self.dataset.test
        floor = metrics.frechet(self._features(self.dataset.train.x)[1], self._held_out)
        return self.score(test.x, test.label) | {"frechet": floor}

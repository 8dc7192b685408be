"""Linear maps fitted to real pictures: to fewer dimensions, and to embeddings of captions."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from twinflow_jax.arrays import Features
from twinflow_jax.evaluation import metrics

STRENGTHS = tuple(10.0**e for e in np.arange(-3, 1.5, 0.5))  # tried, of the mean squared scale
PARTS, BLOCK = 5, 50  # a fifth of the pairs chooses the strength, in blocks of the sorted captions


@dataclasses.dataclass(frozen=True)
class Linear:
    """x -> (x - shift) @ matrix."""

    shift: Float[np.ndarray, "D"]
    matrix: Float[np.ndarray, "D E"]

    def __call__(self, x: Features) -> Float[np.ndarray, "N E"]:
        return (x - self.shift) @ self.matrix


def principal(x: Features, dimensions: int) -> Linear:
    """Onto the directions in which x varies most; distances in them are kept."""
    shift = x.mean(0)
    _, vectors = np.linalg.eigh(np.cov((x - shift).T))
    return Linear(shift, vectors[:, ::-1][:, :dimensions])


def ridges(
    x: Features, y: Float[np.ndarray, "N E"], strengths: Sequence[float]
) -> list[Linear]:
    """From standardised x to centred y, by least squares with a penalty on the matrix.

    strengths: penalties, in units of the mean squared singular value; one map for each.
    """
    shift, scale = x.mean(0), x.std(0) + 1e-6
    standard = (x - shift) / scale
    values, vectors = np.linalg.eigh(standard.T @ standard)
    turned = vectors.T @ (standard.T @ (y - y.mean(0)))
    return [
        Linear(shift, (vectors / (values + s * values.mean())) @ turned / scale[:, None])
        for s in strengths
    ]


def choose_strength(
    x: Features, y: Float[np.ndarray, "N E"], captions: Sequence[str]
) -> float:
    """The penalty with which captions left out of the fit are found best.

    Sorted captions are left out in blocks, so that near copies of them do not stay in.
    """
    places = np.empty(len(captions), int)
    places[np.argsort(captions, kind="stable")] = np.arange(len(captions))
    block = max(1, min(BLOCK, len(captions) // (2 * PARTS)))
    out = places // block % PARTS == 0
    owners, centred = np.arange(out.sum()), y[out] - y[~out].mean(0)
    rates = [
        metrics.retrieved(fitted(x[out]), centred, owners)
        for fitted in ridges(x[~out], y[~out], STRENGTHS)
    ]
    return STRENGTHS[int(np.argmax(rates))]

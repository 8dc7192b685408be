"""Metrics on features, labels and pixels, in float64 NumPy."""

import numpy as np
from jaxtyping import Float

from twinflow_jax.arrays import Features, Labels


def frechet(a: Features, b: Float[np.ndarray, "M D"]) -> float:
    """Frechet distance between Gaussians fitted to two feature sets.

    `|m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))`. Not FID: the features are the
    caller's.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    return float(shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def squared_distances(a: Features, b: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "N M"]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    products = a @ b.T
    return np.maximum(np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * products, 0)


def kernel_distance(a: Features, b: Float[np.ndarray, "M D"]) -> float:
    """Squared maximum mean discrepancy with the kernel `(x y / D + 1)^3`, unbiased.

    KID's formula; not KID: the features are the caller's. About 0, and as easily below it, for
    two samples of one distribution.
    """
    def kernel(x, y):
        return (np.asarray(x, np.float64) @ np.asarray(y, np.float64).T / x.shape[1] + 1) ** 3

    def within(x):
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def retrieved(found: Features, among: Float[np.ndarray, "M D"], owners: Labels) -> float:
    """Share of rows whose nearest neighbour by cosine in `among` is their owner."""
    return float(((unit(found) @ unit(among).T).argmax(1) == owners).mean())


def unit(x: Features) -> Features:
    """Rows of length 1; a row of zeros stays one."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def diversity(features: Features, labels: Labels) -> float:
    """Mean distance between two samples of the same class in feature space, mean over classes."""
    means = []
    for label in np.unique(labels):
        mine = features[labels == label]
        pairs = len(mine) * (len(mine) - 1)
        if pairs:
            means.append(np.sqrt(squared_distances(mine, mine)).sum() / pairs)
    return float(np.mean(means))


def nearest(x: Float[np.ndarray, "N *shape"], real: Float[np.ndarray, "M *shape"]) -> float:
    """Mean root-mean-square pixel distance from each image to its nearest one in `real`."""
    pixels = x[0].size
    squared = squared_distances(x.reshape(len(x), -1), real.reshape(len(real), -1))
    return float(np.sqrt(squared.min(1) / pixels).mean())

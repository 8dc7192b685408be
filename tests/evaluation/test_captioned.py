"""The judge of captioned pictures: its maps, and inputs whose scores are known."""

import numpy as np
import pytest

from twinflow_jax.evaluation import captioned, metrics, projections

RANDOM = np.random.default_rng(0)


def test_kernel_distance_by_hand():
    a, b = np.array([[1.0], [2.0]]), np.array([[0.0], [1.0]])
    between = (1 + 8 + 1 + 27) / 4  # (x y + 1)^3 of all pairs
    assert metrics.kernel_distance(a, b) == pytest.approx(27 + 1 - 2 * between)
    x, y = RANDOM.normal(size=(2, 800, 5))
    assert abs(metrics.kernel_distance(x, y)) < 0.05
    assert metrics.kernel_distance(x + 1, y) > 1


def test_principal_directions_keep_distances():
    x = RANDOM.normal(size=(200, 3)) @ RANDOM.normal(size=(3, 10)) + 5
    reduced = projections.principal(x, 3)(x)
    np.testing.assert_allclose(
        metrics.squared_distances(reduced, reduced), metrics.squared_distances(x, x), atol=1e-8
    )


def test_ridge_is_the_penalised_least_squares_solution():
    x, y = RANDOM.normal(size=(60, 6)) * np.arange(1, 7), RANDOM.normal(size=(60, 3))
    weak, strong = projections.ridges(x, y, [1e-12, 0.5])
    with_one = np.c_[x, np.ones(60)]
    solution = np.linalg.lstsq(with_one, y, rcond=None)[0]
    np.testing.assert_allclose(weak(x), with_one @ solution - y.mean(0), atol=1e-4)
    standard = (x - x.mean(0)) / x.std(0)
    penalty = 0.5 * np.trace(standard.T @ standard) / 6
    by_hand = np.linalg.solve(standard.T @ standard + penalty * np.eye(6), standard.T @ y)
    np.testing.assert_allclose(strong(x), standard @ by_hand, atol=1e-4)


def test_the_strength_that_generalises_is_chosen():
    """Few pairs, many noisy features: almost no penalty fits the noise."""
    y = metrics.unit(RANDOM.normal(size=(150, 8)))
    x = np.c_[y + 0.3 * RANDOM.normal(size=y.shape), RANDOM.normal(size=(150, 100))]
    captions = [f"caption {i:03d}" for i in range(150)]
    assert projections.choose_strength(x, y, captions) > projections.STRENGTHS[0]


@pytest.fixture(scope="module")
def judge():
    """Features are a turned copy of the caption's embedding, and noise."""
    turn = RANDOM.normal(size=(16, 80))

    def see(embeddings):
        features = embeddings @ turn + 0.05 * RANDOM.normal(size=(len(embeddings), 80))
        return captioned.Pictures(features, RANDOM.uniform(-1, 1, (len(embeddings), 4, 4, 3)))

    embeddings = metrics.unit(RANDOM.normal(size=(400, 16)))
    train, held_out = embeddings[:300], embeddings[300:]
    captions = [f"caption {i}" for i in range(300)]
    return captioned.CaptionJudge(see(train), captions, train, see(held_out), held_out), see


def test_judge_tells_right_captions_from_wrong_ones(judge):
    judge, see = judge
    owners = np.repeat(np.arange(100), 4)
    right = judge.score(see(judge.targets[owners]), owners)
    real = judge.real(300)
    assert right["retrieval"] > 0.95 and real["retrieval"] > 0.95
    assert right["frechet"] < real["frechet"]  # the same captions, not only the same kind
    assert right["diversity"] < 0.3 * real["diversity"]
    wrong = judge.score(see(judge.targets[(owners + 1) % 100]), owners)
    assert wrong["retrieval"] < 0.05 and wrong["frechet"] < real["frechet"]
    shifted = see(judge.targets[owners])
    far = judge.score(captioned.Pictures(shifted.features + 1, shifted.small), owners)
    assert far["frechet"] > 10 * real["frechet"] and far["kernel"] > 10 * abs(right["kernel"])
    copied = judge.score(judge.train.spread(50), np.arange(50))
    assert copied["nearest"] < 1e-6 and copied["diversity"] == 0


def test_embeddings_and_pictures_are_reduced():
    tokens = [np.array([[3.0, 0.0], [0.0, 0.0]], np.float16), np.array([[0.0, 2.0]], np.float16)]
    np.testing.assert_allclose(captioned.embedding(tokens), np.eye(2))
    batches = [RANDOM.uniform(-1, 1, (n, 40, 40, 3)).astype(np.float32) for n in (3, 2)]
    seen = captioned.Pictures.see(lambda x: x.mean((1, 2)), batches)
    assert seen.features.shape == (5, 3) and seen.small.shape == (5, 32, 32, 3)
    np.testing.assert_allclose(seen.small.mean((1, 2)), seen.features, atol=0.02)

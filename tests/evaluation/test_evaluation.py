"""Metrics against closed forms, and the judge against inputs whose scores are known."""

import numpy as np
import pytest

from twinflow_jax import data, evaluation
from twinflow_jax.evaluation import metrics, report, sample_labels


def test_frechet_of_gaussians_is_the_closed_form():
    """For samples with exactly the means and diagonal covariances asked for."""
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 4))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T  # white
    mean, scale = np.array([1.0, -2.0, 0.5, 0.0]), np.array([1.0, 2.0, 0.5, 3.0])
    expected = np.square(mean).sum() + np.square(scale - 1).sum()
    assert metrics.frechet(x * scale + mean, x) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)
    rotated = np.linalg.qr(random.normal(size=(4, 4)))[0]
    turned = metrics.frechet((x * scale + mean) @ rotated, x @ rotated)
    assert turned == pytest.approx(expected, rel=1e-9)


def test_diversity_and_nearest_by_hand():
    features = np.array([[0.0], [2.0], [10.0], [16.0]])
    assert metrics.diversity(features, np.array([0, 0, 1, 1])) == pytest.approx(4.0)
    real = np.zeros((2, 2, 2, 1))
    real[1] = 1
    x = np.full((1, 2, 2, 1), 0.75)
    assert metrics.nearest(x, real) == pytest.approx(0.25)


def test_judge_tells_real_from_broken_samples():
    dataset = data.load("digits")
    judge = evaluation.ClassJudge.create(dataset)
    assert judge.real["accuracy"] > 0.95
    test = dataset.test
    random = np.random.default_rng(0)

    wrong = judge.score(test.x, (test.label + 1) % 10)
    assert wrong["accuracy"] < 0.05 and wrong["nearest"] == pytest.approx(judge.real["nearest"])
    noisy = np.clip(test.x + 0.5 * random.normal(size=test.x.shape), -1, 1).astype(np.float32)
    assert judge.score(noisy, test.label)["frechet"] > 3 * judge.real["frechet"]
    means = np.stack([dataset.train.x[dataset.train.label == c].mean(0) for c in test.label])
    blur = judge.score(means, test.label)  # accurate, but every sample of a class is the same
    assert blur["accuracy"] > 0.95 and blur["diversity"] < 0.01 * judge.real["diversity"]
    copied = judge.score(dataset.train.x[:200], dataset.train.label[:200])
    assert copied["nearest"] < 1e-3  # memorised


def test_judge_is_the_same_from_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINFLOW_CACHE", str(tmp_path))
    dataset = data.load("digits")
    made = evaluation.ClassJudge.create(dataset)
    [file] = tmp_path.iterdir()
    read = evaluation.ClassJudge.create(dataset)
    assert read.real == made.real
    file.write_bytes(file.read_bytes()[:100])  # torn: made again
    assert evaluation.ClassJudge.create(dataset).real == made.real


def test_labels_are_balanced_and_table_shows_shares():
    assert np.bincount(sample_labels(1000, 10)).tolist() == [100] * 10
    real = {"accuracy": 1.0, "frechet": 1.0, "kernel": -1e-4, "diversity": 4.0, "nearest": 2.0}
    rows = [{"run": "r", "step": 1, "nfe": 1} | real | {"diversity": 3.0, "nearest": 1.0}]
    text = report.table(rows, real)
    assert "0.75" in text and "0.50" in text and "-0" not in text
    assert report.table(rows, real | {"nearest": 0.0})  # pictures that were trained on
    assert report.plot(rows, real).size[0] > 500

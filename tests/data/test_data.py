"""Data: splits that do not overlap, and batches that depend on (seed, step) alone."""

import itertools

import numpy as np
import pytest

from twinflow_jax import data
from twinflow_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "shape", "train", "test"),
    [("digits", (8, 8, 1), 1433, 364), ("mnist5k", (28, 28, 1), 4000, 1000)],
)
def test_sources(name, shape, train, test):
    dataset = data.load(name)
    assert (len(dataset.train), len(dataset.test), dataset.num_classes) == (train, test, 10)
    for split in (dataset.train, dataset.test):
        assert split.x.shape[1:] == shape and split.x.dtype == np.float32
        assert split.x.min() == -1 and split.x.max() == 1
        counts = np.bincount(split.label)
        assert counts.min() > 0.9 * counts.mean()
    seen = {x.tobytes() for x in dataset.train.x}
    assert sum(x.tobytes() in seen for x in dataset.test.x) == 0


def test_any_batch_comes_from_its_step_alone():
    split = data.load("digits").train
    straight = list(itertools.islice(data.batches(split, 100, seed=3), 40))
    for start in (1, 17, 33):
        resumed = next(data.batches(split, 100, seed=3, start=start))
        np.testing.assert_array_equal(resumed["x"], straight[start]["x"])
        np.testing.assert_array_equal(resumed["label"], straight[start]["label"])
    other = next(data.batches(split, 100, seed=4))
    assert not np.array_equal(other["label"], straight[0]["label"])


def test_an_epoch_shows_each_image_at_most_once_and_the_next_reorders():
    split = data.load("digits").train
    stream = data.batches(split, 100, seed=0)
    first, second = (
        np.concatenate([next(stream)["x"] for _ in range(len(split) // 100)]) for _ in range(2)
    )
    assert len({x.tobytes() for x in first}) >= len(first) - 1  # the data has few duplicates
    assert not np.array_equal(first, second)


def test_absent_data_says_what_to_do(monkeypatch):
    with pytest.raises(UserError, match="choose from digits, mnist5k, mnist"):
        data.load("imagenet")
    with pytest.raises(UserError, match="too few for a batch of 5000"):
        data.batches(data.load("digits").train, 5000, seed=0)
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="pip install"):
        data.load("mnist")

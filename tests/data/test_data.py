"""Named datasets: splits that do not overlap."""

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


def test_absent_data_says_what_to_do(monkeypatch):
    with pytest.raises(UserError, match="choose from digits, mnist5k, mnist"):
        data.load("imagenet")

"""Named datasets: splits that do not overlap."""

import numpy as np
import pytest

from twinflow_jax import data
from twinflow_jax.data import sources
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


@pytest.mark.parametrize(("change", "said"), [
    ({"x": np.zeros((4, 2, 2, 1))}, "images are float64 in"),
    ({"x": np.full((4, 2, 2, 1), 255, np.float32)}, r"images are float32 in \[255.0, 255.0\], not"),
    ({"x": np.full((4, 2, 2, 1), np.nan, np.float32)}, "images are float32 in"),
    ({"label": np.array([0, 1, 2, 0], np.int32)}, r"labels are int32 in \[0, 2\], not"),
    ({"captions": ("a", "b", "c")}, "3 captions for 2 classes"),
])
def test_what_a_source_may_not_give_is_told(change, said):
    given = {"x": np.zeros((4, 2, 2, 1), np.float32), "label": np.array([0, 1, 0, 1], np.int32),
             "captions": ("a", "b")} | change
    part = data.Split(given["x"], given["label"])
    with pytest.raises(ValueError, match=f"new: {said}"):
        data.Dataset("new", 2, part, part, given["captions"])


def test_a_split_has_its_own_captions():
    x, label = np.zeros((10, 2, 2, 1)), np.arange(10) % 2
    made = sources.split("new", x, label, ("a cat", "a dog"))
    assert (made.captions, made.num_classes) == (("a cat", "a dog"), 2)
    assert (len(made.train), len(made.test)) == (8, 2)


def test_absent_data_says_what_to_do(monkeypatch):
    with pytest.raises(UserError, match="choose from digits, mnist5k, mnist"):
        data.load("imagenet")

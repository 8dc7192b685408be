"""Batches depend on (seed, step) alone: any step, any host, shapes and mixtures included."""

import itertools

import numpy as np
import pytest

from twinflow_jax import data

BATCH = 16


def stream(name: int, count: int, shape=(2,), weight: float = 1.0) -> data.Stream:
    """Rows whose x tells the stream and the row; the label is drawn from the seeds."""
    def read(rows, seeds):
        x = np.broadcast_to((1000 * name + rows)[:, None], (len(rows), *shape))
        drawn = [np.random.default_rng(seed).integers(1000) for seed in seeds]
        return {"x": x, "cond": {"label": np.array(drawn)}}

    return data.Stream(count, read, weight)


MIXED = (
    (stream(0, 300, (2,), 3.0), stream(1, 50, (2,), 1.0)),
    (stream(2, 77, (3,), 1.0), stream(3, 5, (3,), 1.0)),
    (stream(4, 40, (4,), 0.5),),
)


def take(streams, count, start=0, seed=3, rows=None):
    return list(itertools.islice(data.batches(streams, BATCH, seed, start, rows), count))


def assert_same(one, other):
    assert one[0] == other[0]
    np.testing.assert_array_equal(one[1]["x"], other[1]["x"])
    np.testing.assert_array_equal(one[1]["cond"]["label"], other[1]["cond"]["label"])


@pytest.mark.parametrize("streams", [((stream(0, 100),),), MIXED])
def test_any_batch_comes_from_its_step_alone(streams):
    straight = take(streams, 60)
    for start in (1, 17, 59):
        assert_same(take(streams, 1, start)[0], straight[start])
    (_, mine), (_, other) = straight[0], take(streams, 1, seed=4)[0]
    assert not np.array_equal(mine["x"], other["x"])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_their_rows_of_the_same_batches(hosts):
    whole = take(MIXED, 30)
    parts = [take(MIXED, 30, rows=np.arange(BATCH)[host::hosts]) for host in range(hosts)]
    for step, (shape, batch) in enumerate(whole):
        for host, part in enumerate(parts):
            mine = {
                "x": batch["x"][host::hosts], "cond": {"label": batch["cond"]["label"][host::hosts]}
            }
            assert_same(part[step], (shape, mine))


def test_an_epoch_shows_each_row_at_most_once_and_the_next_reorders():
    found = [batch["x"][:, 0] for _, batch in take(((stream(0, 100),),), 12)]
    first, second = np.concatenate(found[:6]), np.concatenate(found[6:])
    assert len(np.unique(first)) == len(np.unique(second)) == 96
    assert not np.array_equal(first, second)


def test_batches_are_of_one_shape_and_streams_come_by_their_weights():
    steps, counts = 1300, np.zeros(5)
    for shape, batch in take(MIXED, steps):
        x = batch["x"]
        assert x.shape == (BATCH, 2 + shape)
        np.add.at(counts, (x[:, 0] // 1000).astype(int), 1)
    shares = counts / counts.sum()
    np.testing.assert_allclose(shares, np.array([3, 1, 1, 1, 0.5]) / 6.5, atol=0.005)


def test_every_row_of_a_stream_smaller_than_a_batch_is_read():
    seen = np.concatenate([batch["x"][:, 0] for shape, batch in take(MIXED, 60) if shape == 1])
    assert set(range(3000, 3005)) <= set(seen.tolist())


def test_seeds_differ_between_rows_and_epochs():
    batches = take(((stream(0, 16),),), 40)
    drawn = np.concatenate([batch["cond"]["label"] for _, batch in batches])
    assert len(np.unique(drawn)) > 300

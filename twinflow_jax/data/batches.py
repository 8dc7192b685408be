"""Batches of one or several streams of rows, any of them computable from its step number alone.

A step is of one shape of samples, so that each shape is compiled once. Shapes, and within a batch
the streams of its shape, take turns by weight; every stream is permuted anew in each of its epochs.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Int, UInt

THREADS, AHEAD = 4, 8  # that read, and batches that are read before they are asked for
FOREVER = np.iinfo(np.int32).max

Read = Callable[[Int[np.ndarray, "N"], UInt[np.ndarray, "N 4"]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows that are all of one shape, in an order of (seed, epoch).

    count: of its rows. read: (their numbers, what each may draw from: seeds of a generator) ->
    a tree of arrays with leading axis n. weight: its share among all streams.
    """

    count: int
    read: Read
    weight: float = 1.0


def batches(
    shapes: Sequence[Sequence[Stream]], batch_size: int, seed: int, start: int = 0,
    rows: Int[np.ndarray, "N"] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Endless (number of the shape, batch) from step `start` on, read ahead in threads.

    shapes: the streams of each shape of samples. rows: of the batch that are wanted, for a host
    that holds a part of it (default: all).
    What does not fill a batch at the end of a stream's epoch is left out of that epoch, other
    rows each time; a stream smaller than a batch comes again within one.
    """
    rows = np.arange(batch_size) if rows is None else rows
    turn_of_shape = turns([sum(stream.weight for stream in streams) for streams in shapes])
    turn_of_stream = [turns([stream.weight for stream in streams]) for streams in shapes]
    numbers = itertools.count()
    orders = [
        [order(stream.count, batch_size, seed, next(numbers)) for stream in streams]
        for streams in shapes
    ]

    def batch(step: int):
        shape, turn = turn_of_shape(np.array([step]))
        shape, first = int(shape[0]), int(turn[0]) * batch_size
        owners, places = turn_of_stream[shape](first + rows)
        found = []
        for owner in np.unique(owners):
            mine = owners == owner
            found.append((mine, shapes[shape][owner].read(*orders[shape][owner](places[mine]))))
        return shape, joined(found, len(rows))

    steps = grain.MapDataset.range(start, FOREVER).map(lambda step: batch(int(step)))
    return iter(steps.to_iter_dataset(grain.ReadOptions(THREADS, AHEAD)))


def turns(weights: Sequence[float]):
    """`places -> (who, which of theirs)`: an endless row in which each comes by its weight."""
    if len(weights) == 1:
        return lambda places: (np.zeros(len(places), int), places)
    endless = [
        grain.MapDataset.range(2**62).map(lambda turn, who=who: (who, turn))
        for who in range(len(weights))
    ]
    mixed = grain.MapDataset.mix(endless, weights)
    return lambda places: tuple(np.array([mixed[int(place)] for place in places]).T)


def order(count: int, batch_size: int, seed: int, number: int):
    """`places -> (rows, seeds)`: the order that stream `number` is read in."""
    per_epoch = count - count % batch_size or count

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch, number)).permutation(count)

    def rows(places):
        epochs, places = np.divmod(places, per_epoch)
        found = np.empty(len(places), int)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            found[mine] = permutation(int(epoch))[places[mine]]
        seeds = np.empty((len(places), 4), np.uint64)
        seeds[:, 0], seeds[:, 1], seeds[:, 2], seeds[:, 3] = seed, epochs, number, found
        return found, seeds

    return rows


def joined(parts: list[tuple[np.ndarray, dict[str, Any]]], count: int) -> dict[str, Any]:
    """One batch of the parts' rows, each at the places that its mask gives."""
    if len(parts) == 1:
        return parts[0][1]

    def one(*arrays):
        whole = np.empty((count, *arrays[0].shape[1:]), arrays[0].dtype)
        for (mine, _), array in zip(parts, arrays, strict=True):
            whole[mine] = array
        return whole

    return jax.tree.map(one, *(tree for _, tree in parts))

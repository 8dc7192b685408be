"""Tiles: what is exact, what is blended, and that the network meets one shape."""

from fractions import Fraction

import numpy as np
import pytest

from twinflow_jax.errors import UserError
from twinflow_jax.models import tiling


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).normal(size=(2, height, width, 3)).astype(np.float32)


def local(x: np.ndarray) -> np.ndarray:
    """Nearest upsampling by 2, then a zero-padded 5x5 blur: a receptive field of one place."""
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    views = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    return np.tanh(views.mean(axis=(-1, -2)))


def halve(x: np.ndarray) -> np.ndarray:
    rows, height, width, channels = x.shape
    return x.reshape(rows, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


@pytest.mark.parametrize("size", [(9, 7), (16, 5), (8, 3)])
def test_an_image_within_one_tile_is_untouched(size):
    x = image(*size)
    np.testing.assert_array_equal(tiling.tiled(local, x, 16, 8, 2), local(x))


@pytest.mark.parametrize("size", [(17, 23), (8, 41), (24, 9)])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 4), (10, 4), (9, 4)])
def test_a_local_network_gives_the_untiled_result_in_one_shape(size, tile, overlap):
    x, shapes = image(*size), set()

    def fn(piece):
        shapes.add(piece.shape)
        return local(piece)

    np.testing.assert_allclose(tiling.tiled(fn, x, tile, overlap, 2), local(x), atol=1e-6)
    assert len(shapes) == 1


def test_tiles_shrink_too():
    x = image(34, 22)
    np.testing.assert_allclose(tiling.tiled(halve, x, 12, 4, Fraction(1, 2)), halve(x), atol=1e-6)


@pytest.mark.parametrize("overlap", range(9))
@pytest.mark.parametrize("size", [17, 18, 24, 25, 51])
def test_weights_add_up_to_one_and_change_gradually(size, overlap):
    corners = tiling.starts(size, 16, 16 - overlap)
    weights = tiling.blend_weights(corners, 16, overlap)
    total = np.zeros(size)
    for start, weight in zip(corners, weights, strict=True):
        total[start : start + 16] += weight
        if overlap > 1:
            assert np.abs(np.diff(weight)).max() <= 3 / overlap  # 2, but where three meet
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert corners[-1] + 16 == size and max(np.diff(corners)) <= 16 - overlap


def test_a_network_that_sees_its_tile_is_blended_without_seams():
    x = np.broadcast_to(np.linspace(0, 1, 64, dtype=np.float32)[:, None, None], (1, 64, 8, 1))
    means = lambda piece: np.broadcast_to(piece.mean(axis=1, keepdims=True), piece.shape)
    out = tiling.tiled(means, x, 32, 16, 1)[0, :, 0, 0]
    assert np.abs(np.diff(out)).max() <= 2 / 16 * 16 / 63 + 1e-6


def test_refusals_name_what_to_change():
    with pytest.raises(UserError, match="from 0 to 4"):
        tiling.tiled(local, image(9, 9), 8, 5, 2)
    with pytest.raises(UserError, match="divisible by 8"):
        tiling.tiled(local, image(20, 16), 16, 8, Fraction(1, 8))

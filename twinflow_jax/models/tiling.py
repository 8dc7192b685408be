"""A convolutional network over an image too large for device memory: tile by tile, blended."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from jaxtyping import Float

from twinflow_jax.errors import UserError


def starts(size: int, tile: int, step: int) -> list[int]:
    """Where tiles begin along one axis; the last one is moved back to end with the image."""
    return [*range(0, size - tile, step), size - tile]


def blend_weights(corners: list[int], tile: int, overlap: int) -> list[Float[np.ndarray, "{tile}"]]:
    """The share of each tile in the image along one axis; at every place they add up to 1.

    A tile fades linearly over the middle half of an overlap: its outermost quarter, where the
    network saw the zero padding of an edge that the image does not have, counts for nothing.
    """
    fade = np.clip((np.arange(tile) + 0.5 - overlap / 4) / max(overlap / 2, 0.5), 0, 1)
    whole = np.ones(tile)
    total, shares = np.zeros(corners[-1] + tile), []
    for start in corners:
        share = (fade if start else whole) * (whole if start == corners[-1] else fade[::-1])
        total[start : start + tile] += share
        shares.append(share)
    return [
        np.float32(share / total[start : start + tile])
        for start, share in zip(corners, shares, strict=True)
    ]


def tiled(
    fn: Callable, x: Float[np.ndarray, "B H W C"], tile: int, overlap: int, scale: Fraction | int
) -> Float[np.ndarray, "B H*{scale} W*{scale} c"]:
    """`fn(x)` by overlapping tiles: the device holds one at a time, the host the float32 result.

    fn: (B, h, w, C) -> (B, h*scale, w*scale, K); it meets one shape only, (B, tile, tile, C) or
    less where the image is smaller, so jit it. tile, overlap: in places of x, overlap at most
    half a tile. scale: 8 to decode, Fraction(1, 8) to encode. An image that fits in one tile
    gives exactly `fn(x)`; otherwise places whose receptive field stays within overlap/4 keep
    their value, and what reaches further (global attention) is approximated.

    Raises UserError for an overlap that does not fit, or sizes that scale to a fraction.
    """
    if not 0 <= overlap <= tile // 2:
        raise UserError(
            f"tiles of {tile} cannot overlap by {overlap}: choose an overlap from 0 to {tile // 2}"
        )
    sizes = x.shape[1:3]
    if any((size * scale) % 1 for size in (*sizes, tile, overlap)):
        raise UserError(
            f"an image of {sizes[0]}x{sizes[1]} in tiles of {tile} overlapping by {overlap} does "
            f"not scale by {scale}: make all four divisible by {Fraction(scale).denominator}"
        )
    sides = [min(tile, size) for size in sizes]
    corners = [starts(size, side, tile - overlap) for size, side in zip(sizes, sides, strict=True)]
    scaled = lambda places: int(places * scale)
    rows, columns = (
        blend_weights([scaled(start) for start in axis], scaled(side), scaled(overlap))
        for axis, side in zip(corners, sides, strict=True)
    )
    out = None
    for top, row in zip(corners[0], rows, strict=True):
        for left, column in zip(corners[1], columns, strict=True):
            piece = fn(x[:, top : top + sides[0], left : left + sides[1]])
            piece = np.asarray(piece, np.float32) * (row[:, None] * column)[..., None]
            if out is None:
                out = np.zeros((len(x), *map(scaled, sizes), piece.shape[-1]), np.float32)
            y, x0 = scaled(top), scaled(left)
            out[:, y : y + len(row), x0 : x0 + len(column)] += piece
    return out

"""Square patches of maps as tokens, whose channels are by row, then column, then the map's own."""

from jaxtyping import Array, Float

from twinflow_jax.arrays import Maps
from twinflow_jax.errors import UserError


def grid(maps: Maps, patch: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
      UserError: the sides are no multiples of the patch.
    """
    _, height, width, _ = maps.shape
    if height % patch or width % patch:
        raise UserError(
            f"latents of {height}x{width} do not divide into patches of {patch}x{patch}: take "
            f"sides that are multiples of {patch}"
        )
    return height // patch, width // patch


def pack(maps: Maps, patch: int) -> Float[Array, "B S C*{patch}**2"]:
    rows, height, width, channels = maps.shape
    x = maps.reshape(rows, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(rows, -1, patch * patch * channels)


def unpack(tokens: Float[Array, "B S D"], grid: tuple[int, int], patch: int) -> Maps:
    """The inverse of `pack`. grid: rows and columns of patches."""
    rows, (height, width) = tokens.shape[0], grid
    x = tokens.reshape(rows, height, width, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(rows, height * patch, width * patch, -1)

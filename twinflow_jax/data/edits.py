"""Edits that need no set of them: a dataset's pictures, changed as instructions say."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from twinflow_jax.data.sources import to_rgb

Pictures = Float[np.ndarray, "N H W 3"]
CHANGES: dict[str, Callable[[Pictures], Pictures]] = {
    "invert the colours": lambda x: -x,
    "paint it green": lambda x: np.roll(x, 1, axis=-1),
    "mirror the picture": lambda x: x[:, :, ::-1],
}


def sources(
    x: Float[np.ndarray, "N H W C"], height: int, width: int
) -> Float[np.ndarray, "N {height} {width} 3"]:
    """Images in red on black, of another size, so that each change is another picture."""
    return to_rgb(x, height, width) * np.float32([1, 0, 0]) - np.float32([0, 1, 1])

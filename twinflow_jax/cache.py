"""What was computed once and is kept for the next time."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import safetensors.numpy

from twinflow_jax import files


def kept(
    name: str, key: Sequence[bytes], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What `make` gives, from the cache where it is there already.

    key: all that it depends on. An unreadable copy is made again; a cache that cannot be
    written only costs time.
    """
    digest = hashlib.sha256()
    for part in key:
        digest.update(part)
    file = files.cache() / f"{name}-{digest.hexdigest()[:16]}.safetensors"
    try:
        return safetensors.numpy.load_file(file)
    except (OSError, safetensors.SafetensorError):
        pass
    arrays = make()
    with contextlib.suppress(OSError):
        files.write(file, safetensors.numpy.save(arrays))
    return arrays

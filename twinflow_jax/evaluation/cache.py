"""What judges computed once and keep for the next time."""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import safetensors.numpy

from twinflow_jax import files


def folder() -> pathlib.Path:
    """$TWINFLOW_CACHE, or the user's cache folder."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "twinflow_jax")
    return pathlib.Path(files.path(os.environ.get("TWINFLOW_CACHE", default)))


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
    file = folder() / f"{name}-{digest.hexdigest()[:16]}.safetensors"
    try:
        return safetensors.numpy.load_file(file)
    except (OSError, safetensors.SafetensorError):
        pass
    arrays = make()
    with contextlib.suppress(OSError):
        files.write(file, safetensors.numpy.save(arrays))
    return arrays

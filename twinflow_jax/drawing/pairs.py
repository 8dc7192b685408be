"""Pairs of noise and the picture that a run draws from it in many steps, as a safetensors file."""

import hashlib

import numpy as np
from etils import epath

from twinflow_jax.checkpoints import tensors
from twinflow_jax.data import Split
from twinflow_jax.errors import UserError


def save(file: epath.PathLike, pairs: Split) -> None:
    """Writes `noise`, `x` and `label`."""
    arrays = {"noise": pairs.noise, "x": pairs.x, "label": pairs.label}
    tensors.save(epath.Path(file), arrays)


def read(file: epath.PathLike) -> Split:
    """What `save` wrote.

    Raises:
      UserError: no such file, or not one of these.
    """
    found = {k: t.read() for k, t in tensors.read_header(epath.Path(file)).items()}
    kinds = {"noise": np.float32, "x": np.float32, "label": np.int32}
    if (
        any(name not in found or found[name].dtype != kind for name, kind in kinds.items())
        or found["x"].ndim != 4 or found["noise"].shape != found["x"].shape
        or found["label"].shape != found["x"].shape[:1]
    ):
        raise UserError(f"{file} holds no pairs: write one with `twinflow sample --pairs`")
    return Split(found["x"], found["label"], found["noise"])


def digest(pairs: Split) -> str:
    """Of what they hold."""
    content = hashlib.sha256()
    for array in (pairs.noise, pairs.x, pairs.label):
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()

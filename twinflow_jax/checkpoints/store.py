"""Arrays on disk, by tree path: written slice by slice, read shard by shard (tensorstore).

An array of stacked layers is stored one layer a file, so that a converter never holds more than
a layer, and in pieces along its input dimension, so that each device of a mesh reads its own.
"""

import math
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath
from jax.sharding import Sharding
from tqdm import tqdm

from twinflow_jax.errors import UserError
from twinflow_jax.models import names

Arrays = dict[str, ts.TensorStore]


def location(folder: epath.PathLike) -> str:
    """A folder as tensorstore names it: `gs://...` as it is, local paths as `file://`."""
    text = str(folder).rstrip("/")
    return f"{text}/" if "://" in text else f"file://{epath.Path(text).resolve()}/"


def create(
    folder: epath.Path, shape: tuple[int, ...], dtype: np.dtype, by_layer: bool = False,
    pieces: int = 1,
) -> ts.TensorStore:
    """A new array in a folder of its own.

    by_layer: one file for each place along the first axis, to be written one by one. pieces:
    parts of a file along its input dimension (the first, or the one after the layers), each of
    which can be read alone; what does not divide stays whole.
    """
    file_shape = (1, *shape[1:]) if by_layer else shape
    axis = 1 if by_layer else 0
    chunk = list(file_shape)
    if len(shape) > axis + 1 and chunk[axis] % pieces == 0:
        chunk[axis] //= pieces
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if chunk != list(file_shape):
        codecs = [
            {
                "name": "sharding_indexed",
                "configuration": {"chunk_shape": chunk, "codecs": codecs},
            }
        ]
    if math.prod(chunk) == 0:
        raise AssertionError(f"{folder}: an array of shape {shape}")
    return ts.open(
        {
            "driver": "zarr3", "kvstore": location(folder),
            "metadata": {
                "shape": list(shape), "data_type": np.dtype(dtype).name, "codecs": codecs,
                "chunk_grid": {
                    "name": "regular", "configuration": {"chunk_shape": list(file_shape)}
                },
            },
        },
        create=True, delete_existing=True,
    ).result()


def open_array(kvstore: str | dict[str, Any]) -> ts.TensorStore:
    """An array that is there.

    Raises:
      UserError: it is not, or cannot be read.
    """
    try:
        return ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()
    except ValueError as error:
        where = kvstore if isinstance(kvstore, str) else kvstore.get("path", "")
        raise UserError(f"array {where} cannot be read: {str(error).splitlines()[0]}") from error


def load(arrays: Arrays, abstract, label: str, progress: bool = True):
    """The tree of jax arrays that `abstract` describes.

    abstract: nested dicts of ShapeDtypeStruct with shardings; every device reads only its part,
    which is cast to the wanted dtype. label: for the progress bar.
    Raises:
      UserError: an array is missing, has another shape, or cannot be read; all that are missing
        or differ are named.
    """
    wanted = names.flatten(abstract)
    problems = [f"{path} is missing" for path in wanted if path not in arrays]
    problems += [
        f"{path} is {tuple(arrays[path].shape)}, not {leaf.shape}"
        for path, leaf in wanted.items()
        if path in arrays and tuple(arrays[path].shape) != leaf.shape
    ]
    if problems:
        raise UserError(f"{label} does not fit its config: {'; '.join(problems)}")
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in wanted.values())
    flat = {}
    with tqdm(
        total=total, unit="B", unit_scale=True, desc=label, disable=not progress, leave=False
    ) as bar:
        for path, leaf in wanted.items():
            flat[path] = _read(arrays[path], leaf.shape, leaf.dtype, leaf.sharding)
            bar.update(math.prod(leaf.shape) * leaf.dtype.itemsize)
    return names.unflatten(flat)


def _read(array: ts.TensorStore, shape, dtype, sharding: Sharding) -> jax.Array:
    def part(index):
        try:
            return array[index].read().result().astype(dtype, copy=False)
        except ValueError as error:
            raise UserError(
                f"an array cannot be read: {str(error).splitlines()[0][:300]}"
            ) from error

    return jax.make_array_from_callback(shape, sharding, part)

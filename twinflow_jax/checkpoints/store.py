"""Arrays on disk, by tree path: written slice by slice, read shard by shard (tensorstore).

A large array of stacked layers is stored one layer a file, so that a converter never holds more
than a layer, and in parts along its input dimension, so that each device reads its own.
"""

import concurrent.futures
import contextlib
import hashlib
import math
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath
from tqdm import tqdm

from twinflow_jax import buckets
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.adapters import is_adapter
from twinflow_jax.models.int8 import Quantised, is_quantised, quantised

Arrays = dict[str, ts.TensorStore]
T = TypeVar("T")

# Local files reach the disk when their folder is finished (files.whole_folder), not one by one.
CONTEXT = ts.Context({"file_io_sync": False})

# What tensorstore takes for a slash, orbax for the beginning of an address, or neither for text.
MISREAD = re.compile(r"\\|gs:/|[\ud800-\udfff]")
MISREAD_REMOTE = re.compile(r"[\\#?*\[\]\ud800-\udfff]")  # in a bucket, or for a pattern


def absolute(folder: epath.PathLike) -> epath.Path:
    """A folder's absolute path.

    Raises:
      UserError: tensorstore or orbax would write to another.
    """
    path = buckets.absolute(folder)
    misread = MISREAD_REMOTE if buckets.is_remote(path) else MISREAD
    if found := misread.search(f"{path}/"):
        raise UserError(
            f"arrays cannot be stored in a folder with {found[0]!r} in its path: rename "
            f"{str(path)!r}"
        )
    return path


def location(folder: epath.PathLike) -> str:
    """A folder as tensorstore names it, a URL: `gs://...`, `file://...` for local paths."""
    scheme, _, path = str(absolute(folder)).rpartition("://")
    return f"{scheme or 'file'}://{urllib.parse.quote(path)}/"


def create(
    folder: epath.Path, shape: tuple[int, ...], dtype: np.dtype,
    file: tuple[int, ...] | None = None, part: tuple[int, ...] | None = None,
) -> ts.TensorStore:
    """A new array in a folder of its own.

    file: shape of what shares a file, to be written at once (default: everything). part: shape
    of what can be read alone; a file holds a whole number of them (default: one).
    Raises:
      UserError: it cannot be written.
    """
    file = file or shape
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if part not in (None, file):
        shards = {"chunk_shape": list(part), "codecs": codecs}
        codecs = [{"name": "sharding_indexed", "configuration": shards}]
    spec = {
        "driver": "zarr3", "kvstore": location(folder),
        "metadata": {
            "shape": list(shape), "data_type": np.dtype(dtype).name, "codecs": codecs,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(file)}},
        },
        "store_data_equal_to_fill_value": True,  # so that a file that is gone is no zeros
    }
    with _told(f"array {folder} cannot be made"):
        return ts.open(spec, create=True, delete_existing=True, context=CONTEXT).result()


def open_array(kvstore: str | dict[str, Any]) -> ts.TensorStore:
    """An array that is there.

    Raises:
      UserError: it is not, or cannot be read.
    """
    spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
    where = kvstore if isinstance(kvstore, str) else kvstore.get("path", "")
    with _told(f"array {where} cannot be read"):
        return ts.open(spec, open=True, read=True).result()


def read(array: ts.TensorStore) -> np.ndarray:
    """An array, or the part of it that indexing gave.

    Raises:
      UserError: it cannot be read.
    """
    values = np.empty(array.shape, array.dtype.numpy_dtype)
    with _told("an array cannot be read"):
        # Into memory of numpy's, whose pages are large: twice as fast as array.read().
        ts.array(values).write(array).result()
    return values


def write(array: ts.TensorStore, values: np.ndarray) -> None:
    """Writes an array, or the part of it that indexing gave, to its end.

    values: not to be changed afterwards.
    Raises:
      UserError: it cannot be written.
    """
    future = array.write(values, can_reference_source_data_indefinitely=True)
    try:
        with _told("an array cannot be written"):
            future.result()
    except KeyboardInterrupt:
        future.exception()  # what is removed next should not be written to any more
        raise


@contextlib.contextmanager
def _told(what: str):
    """UserError for what fails inside, with what tensorstore says, without its appendices."""
    try:
        yield
    except ValueError as error:
        says = re.split(r" \[\w+=|\n", str(error))[0]
        raise UserError(f"{what}: {says}") from error


def sampled(arrays: Mapping[str, Any]) -> bytes:
    """A sample of weights, the same in whichever dtype they are kept: to tell others from them.

    arrays: by path, stored or in memory.
    """
    size = {path: math.prod(array.shape) for path, array in arrays.items()}
    by_size, found = sorted(arrays, key=lambda path: (size[path], path)), b""
    for quarter in range(4):  # without the largest, of which a row may cost reading it whole
        array = arrays[by_size[quarter * len(by_size) // 4]]
        row = array[(0,) * (len(array.shape) - 1)]
        row = read(row) if isinstance(row, ts.TensorStore) else np.asarray(row)
        found += row.astype(ml_dtypes.bfloat16).tobytes()
    return found


def fingerprint(arrays: Mapping[str, Any]) -> str:
    """Of weights, as `sampled`, and of all that their adapters hold: another one for others."""
    low = {path: array for path, array in sorted(arrays.items()) if is_adapter(path)}
    digest = hashlib.sha256(sampled({k: a for k, a in arrays.items() if k not in low}))
    for path, array in low.items():
        values = read(array) if isinstance(array, ts.TensorStore) else np.asarray(array)
        digest.update(path.encode() + values.astype(np.float32).tobytes())
    return digest.hexdigest()[:12]


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, the next one being made while the last one is used."""
    items, end = iter(items), object()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, items, end)
        while (item := waiting.result()) is not end:
            waiting = thread.submit(next, items, end)
            yield item


def misfits(arrays: Arrays, wanted: dict[str, Any]) -> list[str]:
    """What is wrong with arrays that should have the shapes of abstract leaves, by path."""
    problems = [f"{path} is missing" for path in wanted if path not in arrays]
    return problems + [
        f"{path} is {tuple(arrays[path].shape)}, not {leaf.shape}"
        for path, leaf in wanted.items()
        if path in arrays and tuple(arrays[path].shape) != leaf.shape
    ]


def on_one_device(abstract):
    """Abstract leaves, to be loaded whole onto the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract
    )


def load(arrays: Arrays, abstract, label: str, progress: bool = True):
    """The tree of jax arrays that `abstract` describes.

    abstract: nested dicts of ShapeDtypeStruct with shardings; every device reads only its part,
    which is cast to the wanted dtype, or quantised there. label: for the progress bar.
    Raises:
      UserError: an array is missing, has another shape, or cannot be read; all that are missing
        or differ are named.
    """
    wanted = names.flatten(abstract)
    problems = misfits(arrays, wanted)
    if problems:
        raise UserError(f"{label} does not fit its config: {'; '.join(problems)}")

    def one(array, leaf) -> jax.Array | Quantised:
        if is_quantised(leaf):
            there = jax.tree.map(lambda part: part.sharding, leaf)
            kernel = jax.ShapeDtypeStruct(
                leaf.shape, array.dtype.numpy_dtype, sharding=there.values
            )
            return jax.jit(quantised, out_shardings=there)(one(array, kernel))
        part = lambda index: read(array[index]).astype(leaf.dtype, copy=False)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(wanted))
    flat = {}
    with bytes_bar(label, total, progress, leave=False) as bar:
        for path, leaf in wanted.items():
            flat[path] = one(arrays[path], leaf)
            bar.update(sum(leaf.nbytes for leaf in jax.tree.leaves(flat[path])))
    return names.unflatten(flat)


def bytes_bar(label: str, total: int, progress: bool, leave: bool = True) -> tqdm:
    """Shows how many of so many bytes are done. leave: whether it stays when all are."""
    return tqdm(
        total=total, unit="B", unit_scale=True, desc=label, disable=not progress, leave=leave,
        dynamic_ncols=True, smoothing=0.05,
    )

"""Safetensors files as streams: one tensor in memory at a time, local or object storage.

The safetensors library maps local files and builds a new file whole in memory; a 40 GB
checkpoint in a bucket allows neither. The format is simple: 8 bytes with the header's length
(little-endian), a JSON header with dtype, shape and place of each tensor, then the data.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
from etils import epath

from twinflow_jax import files
from twinflow_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz), "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8), "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the safetensors library's own limit
PLAIN = {"format": "pt"}  # what the libraries that read such files want their headers to say
BLOCK = 128  # rows that are transposed at once: they stay in a core's cache


def nbytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `offset` bytes from the start of its file."""

    file: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)

    def read(self) -> np.ndarray:
        """The tensor itself.

        Raises:
          UserError: the file cannot be read, or ends before the tensor does.
        """
        data = np.empty(self.nbytes, np.uint8)
        try:
            with self.file.open("rb") as handle:
                handle.seek(self.offset)
                size = _read_into(handle, data)
        except OSError as error:
            raise UserError(f"{self.file} cannot be read ({error.strerror or error})") from error
        if size != self.nbytes:
            raise UserError(f"{self.file} became shorter while it was read")
        return data.view(self.dtype).reshape(self.shape)


def _read_into(handle, data: np.ndarray) -> int:
    """Fills an array of bytes from a file; returns how many there were."""
    if hasattr(handle, "readinto"):  # three times as fast: numpy's memory is in large pages
        return handle.readinto(data)
    found = handle.read(len(data))
    data[: len(found)] = np.frombuffer(found, np.uint8)
    return len(found)


def read_header(file: epath.Path) -> dict[str, Tensor]:
    """The tensors of a file by key, none of them read.

    Raises:
      UserError: not a safetensors file, truncated, or with a header that does not fit its data.
    """
    return _read_header(file)[0]


def metadata(file: epath.Path) -> dict[str, str]:
    """The texts in a file's header.

    Raises:
      UserError: as `read_header`.
    """
    return _read_header(file)[1]


def _read_header(file: epath.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        size = file.stat().length
        with file.open("rb") as handle:
            start = handle.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(MAX_HEADER, size - 8):
                raise UserError(f"{file} is no safetensors file, or is truncated")
            header = handle.read(length)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error})") from error
    try:
        entries = json.loads(header)
        texts = {k: str(v) for k, v in (entries.pop("__metadata__", None) or {}).items()}
        tensors = {key: _entry(file, 8 + length, **entry) for key, entry in entries.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} has a corrupt header ({error})") from error
    end = 8 + length
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise UserError(f"{file} has a corrupt header: {key} does not follow the one before")
        end += tensor.nbytes
    if end > size:
        raise UserError(f"{file} is truncated: {size:,} bytes of {end:,}")
    if end < size:
        raise UserError(f"{file} has {size - end:,} bytes too many at its end")
    return tensors, texts


def _entry(file: epath.Path, start: int, dtype, shape, data_offsets) -> Tensor:
    """A tensor from its entry in the header; ValueError or TypeError for a wrong one."""
    begin, end = data_offsets
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape {shape}, data_offsets {data_offsets}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}, which is not known here")
    tensor = Tensor(file, DTYPES[dtype], tuple(shape), start + begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"{end - begin} bytes for shape {shape} of {dtype}")
    return tensor


def write(
    file: epath.Path, shapes: dict[str, tuple[np.dtype, tuple[int, ...]]],
    arrays: Iterable[np.ndarray], texts: Mapping[str, str] = PLAIN,
) -> None:
    """Writes a file tensor by tensor; it appears complete or not at all. Makes its folder.

    shapes: dtype and shape of each key; arrays: the tensors, in the same order. texts: of the
    header. OSError where the file cannot be written.
    """
    header, place = {"__metadata__": dict(texts)}, 0
    for key, (dtype, shape) in shapes.items():
        end = place + nbytes(dtype, shape)
        header[key] = {
            "dtype": CODES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [place, end]
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors start at multiples of 8
    with files.whole_file(file) as temporary, temporary.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for (key, (dtype, shape)), array in zip(shapes.items(), arrays, strict=True):
            if array.dtype != dtype or array.shape != tuple(shape):
                raise AssertionError(f"{key} is {array.dtype} {array.shape}")
            handle.write(contiguous(array).reshape(-1).view(np.uint8).data)


def assign(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, several times as fast for a large transposed matrix."""
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, source.shape[1], BLOCK):
        target[:, start : start + BLOCK] = source[:, start : start + BLOCK]


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array itself where its elements lie in order, or such a copy."""
    if array.flags.c_contiguous:
        return array
    copy = np.empty(array.shape, array.dtype)
    assign(copy, array)
    return copy


def save(file: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays that are in memory; makes the file's folder."""
    write(file, {key: (array.dtype, array.shape) for key, array in arrays.items()}, arrays.values())

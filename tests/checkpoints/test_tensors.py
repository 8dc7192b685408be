"""Our safetensors against the library's, and files that are none."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from etils import epath

from twinflow_jax.checkpoints import tensors
from twinflow_jax.errors import UserError

SHAPES = {"matrix": (3, 5), "scalar": (), "empty": (0, 4), "vector": (7,)}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("code", tensors.DTYPES)
def test_both_read_what_the_other_writes(code, tmp_path):
    dtype = safetensors.torch._TYPES[code]
    seed = np.random.SeedSequence().entropy
    rng = np.random.default_rng(seed)
    theirs = {
        name: torch.frombuffer(  # bool may only hold 0 and 1
            bytearray(rng.integers(0, 2, max(1, np.prod(shape, dtype=int)) * dtype.itemsize, "u1")),
            dtype=dtype,
        )[: np.prod(shape, dtype=int)].reshape(shape)
        for name, shape in SHAPES.items()
    }
    safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors")
    found = tensors.read_header(epath.Path(tmp_path / "theirs.safetensors"))
    assert found.keys() == theirs.keys()
    ours = {name: found[name].read() for name in SHAPES}
    for name, tensor in theirs.items():
        assert ours[name].shape == SHAPES[name] and ours[name].dtype == tensors.DTYPES[code]
        assert ours[name].tobytes() == bits(tensor), f"{name}, seed {seed}"

    shapes = {name: (array.dtype, array.shape) for name, array in ours.items()}
    tensors.write(epath.Path(tmp_path / "ours.safetensors"), shapes, ours.values())
    back = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    for name, tensor in theirs.items():
        assert back[name].dtype == dtype and back[name].shape == tensor.shape
        assert bits(back[name]) == bits(tensor), f"{name}, seed {seed}"


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.safetensors"
    safetensors.torch.save_file({"a": torch.arange(6.0), "b": torch.ones(2, 2).bfloat16()}, file)
    return epath.Path(file)


def test_a_file_cut_anywhere_is_refused(small):
    whole = small.read_bytes()
    assert len(tensors.read_header(small)) == 2
    for length in range(len(whole)):
        small.write_bytes(whole[:length])
        with pytest.raises(UserError, match="small.safetensors"):
            tensors.read_header(small)
    small.write_bytes(whole + b"x")
    with pytest.raises(UserError, match="1 bytes too many"):
        tensors.read_header(small)


def test_a_file_that_shrinks_after_its_header_was_read(small):
    found = tensors.read_header(small)
    small.write_bytes(small.read_bytes()[:-1])
    last = max(found.values(), key=lambda tensor: tensor.offset)
    with pytest.raises(UserError, match="became shorter"):
        last.read()
    small.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        last.read()


def entry(dtype="F32", shape=(2,), data_offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


@pytest.mark.parametrize(
    "header",
    [
        b"no json", b"[1]", b'{"a": 3}', b"\xff\xfe", b"[" * 100_000, b'{"a": {"dtype": "F32"}}',
        {"a": entry("F128")}, {"a": entry(["F32"])}, {"a": entry(shape=(-2,))},
        {"a": entry(shape=(2.0,))}, {"a": entry(shape=(True, 2))}, {"a": entry(shape=None)},
        {"a": entry(shape=(3,))}, {"a": entry(data_offsets=(8, 0))}, {"a": entry(data_offsets=8)},
        {"a": entry(shape=(1,), data_offsets=(4, 8))},  # a hole before
        {"a": entry(), "b": entry()},  # both in the same place
        {"a": entry(shape=(1,), data_offsets=(0, 4)), "b": entry(shape=(0,), data_offsets=(8, 8))},
        {"a": entry(data_offsets=(0, float("inf")))}, {"a": entry() | {"more": 1}},
    ],
)
def test_corrupt_headers_are_refused(header, tmp_path):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = epath.Path(tmp_path / "bad.safetensors")
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(UserError, match="bad.safetensors has a corrupt header"):
        tensors.read_header(file)


def test_no_flipped_byte_of_a_header_is_a_crash(small):
    whole, seed = small.read_bytes(), np.random.SeedSequence().entropy
    rng = np.random.default_rng(seed)
    length = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(500):
        data = bytearray(whole)
        data[rng.integers(length)] = rng.integers(256)
        small.write_bytes(data)
        try:
            found = tensors.read_header(small)
        except UserError:
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        assert sum(tensor.nbytes for tensor in found.values()) == len(whole) - length, seed


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def arrays():
        yield np.zeros(4, np.float32)
        raise OSError("disk full")

    shapes = dict.fromkeys("ab", (np.dtype(np.float32), (4,)))
    with pytest.raises(OSError, match="disk full"):
        tensors.write(epath.Path(tmp_path / "new.safetensors"), shapes, arrays())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(3, 5), (300, 257), (257, 300), (2, 3, 4), (9,), ()])
def test_contiguous_and_assign(shape):
    array = np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16)
    copy = tensors.contiguous(array.T)
    assert copy.flags.c_contiguous and copy.tobytes() == array.T.tobytes()
    wide = np.empty(array.T.shape, np.float32)
    tensors.assign(wide, array.T)
    np.testing.assert_array_equal(wide, array.T.astype(np.float32))

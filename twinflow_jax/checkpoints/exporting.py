"""Our checkpoints back into published folders, and the comparison of the two."""

import collections
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath
from tqdm import tqdm

from twinflow_jax import files
from twinflow_jax.checkpoints import published, store, tensors
from twinflow_jax.checkpoints.imported import LATENTS, TIMES, Imported, layout
from twinflow_jax.errors import UserError, few
from twinflow_jax.models.names import Rule

SHARD = 4 << 30  # bytes of an exported file
BLOCK = 1 << 24  # elements that are compared at once
WRAPPER = "Wrapper"  # ends the names of classes that trainers wrap a network in, not exported


@dataclasses.dataclass(frozen=True)
class Stored:
    """A published tensor as we have it: an array, or a layer of one (None: all of it)."""

    array: ts.TensorStore
    rule: Rule
    layer: int | None

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype.numpy_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rule.theirs_shape(tuple(self.array.shape))

    def read(self) -> np.ndarray:
        part = self.array if self.layer is None else self.array[self.layer]
        return self.rule.theirs(store.read(part))


Tensors = dict[str, Stored | tensors.Tensor]  # by published key, read when asked for
Wanted = dict[str, tuple[np.dtype, tuple[int, ...]]]  # dtype and shape by published key


def as_published(
    checkpoint: Imported, name: str, trained: store.Arrays | None = None
) -> Tensors:
    """A network's tensors as published: the checkpoint's, or trained ones in their stead.

    Tensors that the source lacked are left out, except where they were trained.
    Raises:
      UserError: arrays cannot be read, or the trained ones are of another network.
    """
    table, leaves = layout(checkpoint.network(name), checkpoint.config(name))
    if trained and (problems := store.misfits(trained, leaves)):
        raise UserError(
            f"the run's transformer is not that of {checkpoint.folder}: {few(problems, 1)}"
        )
    left_out = set() if trained else set(checkpoint.record["networks"][name]["added"])
    arrays = trained or checkpoint.arrays(name)
    stored = {
        key: Stored(arrays[rule.path], rule, layer if rule.stacked else None)
        for rule in table.rules
        for layer, key in enumerate(table.keys(rule))
        if key not in left_out
    }
    return stored | checkpoint.carried(name)


def export_folder(
    checkpoint: Imported, target: epath.PathLike, dtype: str | None = None,
    trained: store.Arrays | None = None, beside: Mapping[str, bytes] | None = None,
    progress: bool = True,
) -> None:
    """Writes a folder that diffusers loads.

    dtype: of the transformer (default: as trained, or as it was published). trained: arrays of
    a run, which take the place of the transformer's. beside: more files by name (card.make).
    Everything else has its published dtype, except what was narrowed by the import.
    Raises:
      UserError: the target is taken, there is no room, an array cannot be read, or `dtype` or
        `trained` are given where there is no transformer.
    """
    target = epath.Path(target)
    if dtype or trained:
        checkpoint.recorded("transformer")
    networks, wanted = {}, {}
    for name in checkpoint.parts:
        replaced = trained if name == "transformer" else None
        networks[name] = as_published(checkpoint, name, replaced)
        cast = np.dtype(dtype) if dtype and name == "transformer" else None
        own = {} if replaced else checkpoint.record["networks"][name].get("widened", {})
        wanted[name] = {
            key: (cast or np.dtype(own.get(key, tensor.dtype)), tensor.shape)
            for key, tensor in networks[name].items()
        }
    total = sum(tensors.nbytes(*entry) for shapes in wanted.values() for entry in shapes.values())
    alone = "model_index.json" not in checkpoint.record["files"] and len(networks) == 1
    with files.whole_folder(target, total), store.bytes_bar("export", total, progress) as bar:
        for name, network in networks.items():
            part = checkpoint.network(name)
            folder = target if alone else target / part.folder
            _write_network(folder, part.stem, network, wanted[name], bar)
            config = dict(checkpoint.record["networks"][name]["published"])
            settings = checkpoint.record["networks"][name].get("settings", {})
            time = settings.get("time_conditioning")
            if time not in (None, "second_embedder"):  # of which no tensor may say
                config[TIMES] = time
            if shape := settings.get("sample_shape"):
                config[LATENTS] = list(shape[:2])
            if config.get("_class_name", "").endswith(WRAPPER):
                config["_class_name"] = part.classes[0]
            files.write(folder / "config.json", json.dumps(config, indent=2).encode())
        for name in checkpoint.record["files"]:
            data = (checkpoint.folder / "files" / name).read_bytes()
            if name == "model_index.json":
                data = _unwrapped(data, checkpoint)
            files.write(target / name, data)
        for name, data in (beside or {}).items():
            files.write(target / name, data)


def export_single(
    checkpoint: Imported, target: epath.PathLike, dtype: str | None = None,
    trained: store.Arrays | None = None, progress: bool = True,
) -> None:
    """Writes the transformer as one file of published keys, as ComfyUI loads it.

    dtype: as `export_folder`; float8_e4m3fn is of the matrices of blocks, beside bfloat16.
    Raises:
      UserError: as `export_folder`, or the target is taken.
    """
    target = epath.Path(target)
    if target.exists() or target.suffix != ".safetensors":
        raise UserError(f"{target} is there, or is no NAME.safetensors: choose another file")
    network = as_published(checkpoint, "transformer", trained)
    eight = dtype == "float8_e4m3fn"
    own = {} if trained else checkpoint.record["networks"]["transformer"].get("widened", {})

    def kind(key: str, tensor) -> np.dtype:
        if eight and len(tensor.shape) == 2 and re.search(r"\.\d+\.", key):
            return np.dtype(dtype)
        return np.dtype(("bfloat16" if eight else dtype) or own.get(key, tensor.dtype))

    wanted = {key: (kind(key, tensor), tensor.shape) for key, tensor in network.items()}
    total = sum(tensors.nbytes(*entry) for entry in wanted.values())
    files.check_room(target, total)
    with store.bytes_bar("export", total, progress) as bar:
        _write_file(target, network, _ordered(wanted), bar)


def _ordered(wanted: Wanted) -> Wanted:
    """Larger elements first, so that all are aligned, then by name: as the library writes them."""
    return dict(sorted(wanted.items(), key=lambda item: (-item[1][0].itemsize, item[0])))


def _write_file(file: epath.Path, network: Tensors, wanted: Wanted, bar: tqdm) -> None:
    """A file of the wanted tensors of a network."""
    def make() -> Iterator[np.ndarray]:
        for key, (dtype, _) in wanted.items():
            array = tensors.contiguous(network[key].read())
            if dtype.itemsize == 1:  # beyond its range it has NaN only
                most = float(ml_dtypes.finfo(dtype).max)
                array = np.clip(array.astype(np.float32), -most, most)
            yield array.astype(dtype, copy=False)

    def read() -> Iterator[np.ndarray]:
        for array in store.ahead(make()):
            yield array
            bar.update(array.nbytes)

    tensors.write(file, wanted, read())


def _unwrapped(data: bytes, checkpoint: Imported) -> bytes:
    """A model_index.json, naming the published classes instead of a trainer's wrappers."""
    index = json.loads(data)
    networks = {n.folder: n for n in map(checkpoint.network, checkpoint.parts)}
    wrapped = {
        folder: ["diffusers", networks[folder].classes[0]]
        for folder, entry in index.items()
        if folder in networks and entry and str(entry[-1]).endswith(WRAPPER)
    }
    return json.dumps(index | wrapped, indent=2).encode() if wrapped else data


def _write_network(
    folder: epath.Path, stem: str, network: Tensors, wanted: Wanted, bar: tqdm
) -> None:
    """Writes one network's weights, in shards with an index where they are large."""
    shards: list[dict] = [{}]
    size = 0
    for key, entry in _ordered(wanted).items():
        if shards[-1] and size + tensors.nbytes(*entry) > SHARD:
            shards.append({})
            size = 0
        shards[-1][key] = entry
        size += tensors.nbytes(*entry)

    if len(shards) == 1:
        _write_file(folder / f"{stem}.safetensors", network, shards[0], bar)
        return
    place = {}
    for i, shard in enumerate(shards):
        name = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, network, shard, bar)
        place |= dict.fromkeys(shard, name)
    total = sum(tensors.nbytes(*entry) for entry in wanted.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
    files.write(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2).encode())


@dataclasses.dataclass
class Difference:
    """What `compare` found in one network: counts, and a line for each tensor that differs."""

    identical: int = 0
    converted: int = 0
    lines: list[str] = dataclasses.field(default_factory=list)


def compare(
    source: str, checkpoint: Imported, trained: store.Arrays | None = None, progress: bool = True
) -> dict[str, Difference]:
    """A published folder against a checkpoint, tensor by tensor, by network.

    Tensors stored in another dtype than the folder's are compared after the same conversion,
    and counted apart.
    Raises:
      UserError: the folder has problems, or shares no network with the checkpoint.
    """
    folder = published.open_folder(source, checkpoint.family)
    shared = [name for name in checkpoint.parts if name in folder.parts]
    if not shared:
        raise UserError(
            f"{source} holds {folder.family}'s {', '.join(folder.parts)}, {checkpoint.folder} "
            f"{checkpoint.family}'s {', '.join(checkpoint.parts)}: nothing to compare"
        )
    total = sum(t.nbytes for name in shared for t in folder.parts[name].tensors.values())
    found = collections.defaultdict(Difference)
    with store.bytes_bar("verify", total, progress) as bar:
        for name in shared:
            theirs = folder.parts[name].tensors
            ours = as_published(checkpoint, name, trained if name == "transformer" else None)
            result = found[name]
            result.lines += published.grouped(
                "only in the checkpoint", [k for k in ours if k not in theirs]
            )
            result.lines += published.grouped(
                "only in the folder", [k for k in theirs if k not in ours]
            )
            both = ((key, theirs[key], ours[key]) for key in theirs if key in ours)
            for key, a, b in store.ahead(_read_both(both, result)):
                _compare(key, a, b, result)
                bar.update(theirs[key].nbytes)
    return dict(found)


def _read_both(pairs, result: Difference) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """`(key, theirs, ours)` of each pair of one shape; the others are noted down."""
    for key, theirs, ours in pairs:
        if theirs.shape == ours.shape:
            yield key, theirs.read(), tensors.contiguous(ours.read())
        else:
            result.lines.append(f"{key}: shape {list(theirs.shape)}, here {list(ours.shape)}")


def _compare(key: str, theirs: np.ndarray, ours: np.ndarray, result: Difference) -> None:
    """In blocks, so that no copy of a whole tensor is made."""
    bits = np.dtype(f"u{ours.dtype.itemsize}")  # so that NaN equals NaN, and 0 not -0
    same, gap = True, 0.0
    for start in range(0, ours.size, BLOCK):
        a, b = (array.reshape(-1)[start : start + BLOCK] for array in (theirs, ours))
        if not np.array_equal(a.astype(b.dtype, copy=False).view(bits), b.view(bits)):
            gaps = np.abs(a.astype(np.float32) - b.astype(np.float32))
            same, gap = False, np.maximum(gap, gaps.max())  # which keeps NaN
    if not same:
        result.lines.append(f"{key}: differs by up to {gap:.3g}")
    elif theirs.dtype == ours.dtype:
        result.identical += 1
    else:
        result.converted += 1

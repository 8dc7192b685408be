"""Our checkpoints back into published folders, and the comparison of the two."""

import collections
import dataclasses
import json
import math
from collections.abc import Iterator

import numpy as np
import tensorstore as ts
from etils import epath
from tqdm import tqdm

from twinflow_jax import files
from twinflow_jax.checkpoints import published, store, tensors
from twinflow_jax.checkpoints.imported import Imported
from twinflow_jax.checkpoints.importing import DTYPES
from twinflow_jax.errors import UserError
from twinflow_jax.models.names import Rule

SHARD = 4 << 30  # bytes of an exported file


@dataclasses.dataclass(frozen=True)
class Published:
    """A network's tensors under their published keys, read when asked for.

    places: for each key the array, its rule (None: kept as it was) and the layer in a stack.
    """

    places: dict[str, tuple[ts.TensorStore, Rule | None, int | None]]

    def dtype(self, key: str) -> np.dtype:
        return self.places[key][0].dtype.numpy_dtype

    def shape(self, key: str) -> tuple[int, ...]:
        array, rule, _ = self.places[key]
        return tuple(array.shape) if rule is None else rule.theirs_shape(tuple(array.shape))

    def read(self, key: str) -> np.ndarray:
        array, rule, layer = self.places[key]
        try:
            value = (array if layer is None else array[layer]).read().result()
        except ValueError as error:
            raise UserError(f"{key} cannot be read: {str(error).splitlines()[0]}") from error
        return value if rule is None else rule.theirs(value)


def as_published(
    checkpoint: Imported, name: str, trained: store.Arrays | None = None
) -> Published:
    """A network's tensors as published: the checkpoint's, or trained ones in their stead.

    Tensors that the source lacked are left out, except where they were trained.
    """
    table = checkpoint.network(name).table(checkpoint.config(name))
    left_out = set() if trained else set(checkpoint.record["networks"][name]["added"])
    arrays = trained or checkpoint.arrays(name)
    places = {
        key: (arrays[rule.path], rule, layer if rule.stacked else None)
        for rule in table.rules
        for layer, key in enumerate(table.keys(rule))
        if key not in left_out
    }
    kept = {key: (array, None, None) for key, array in checkpoint.carried(name).items()}
    return Published(places | kept)


def export_folder(
    checkpoint: Imported, target: str, dtype: str | None = None,
    trained: store.Arrays | None = None, readme: str = "", progress: bool = True,
) -> None:
    """Writes a folder that diffusers loads.

    dtype: of the transformer (default: as stored); the other networks keep theirs. trained:
    arrays of a run, which take the place of the transformer's. readme: for README.md.
    Raises:
      UserError: the target is taken, there is no room, or an array cannot be read.
    """
    target = epath.Path(target)
    networks = {
        name: as_published(checkpoint, name, trained if name == "transformer" else None)
        for name in checkpoint.parts
    }
    wanted = {}
    for name, network in networks.items():
        cast = DTYPES[dtype] if dtype and name == "transformer" else None
        wanted[name] = {k: (cast or network.dtype(k), network.shape(k)) for k in network.places}
    total = sum(nbytes(*entry) for shapes in wanted.values() for entry in shapes.values())
    alone = "model_index.json" not in checkpoint.record["files"] and len(networks) == 1
    with files.whole_folder(target, total), tqdm(
        total=total, unit="B", unit_scale=True, desc="export", disable=not progress,
        dynamic_ncols=True, smoothing=0.05,
    ) as bar:
        for name, network in networks.items():
            part = checkpoint.network(name)
            folder = target if alone else target / part.folder
            _write_network(folder, part.stem, network, wanted[name], bar)
            config = dict(checkpoint.record["networks"][name]["published"])
            if "_class_name" in config:  # what wraps the network is not in the folder
                config["_class_name"] = part.classes[0]
            files.write(folder / "config.json", json.dumps(config, indent=2).encode())
        for name in checkpoint.record["files"]:
            files.write(target / name, (checkpoint.folder / "files" / name).read_bytes())
        if readme:
            files.write(target / "README.md", readme.encode())


def nbytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _write_network(folder: epath.Path, stem: str, network: Published, wanted, bar: tqdm) -> None:
    """Writes one network's weights, in shards with an index where they are large."""
    shards: list[dict] = [{}]
    size = 0
    for key, entry in wanted.items():
        if shards[-1] and size + nbytes(*entry) > SHARD:
            shards.append({})
            size = 0
        shards[-1][key] = entry
        size += nbytes(*entry)
    folder.mkdir(parents=True, exist_ok=True)

    def read(keys) -> Iterator[np.ndarray]:
        for key in keys:
            yield network.read(key).astype(wanted[key][0], copy=False)
            bar.update(nbytes(*wanted[key]))

    if len(shards) == 1:
        tensors.write(folder / f"{stem}.safetensors", shards[0], read(shards[0]))
        return
    place = {}
    for i, shard in enumerate(shards):
        name = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors.write(folder / name, shard, read(shard))
        place |= dict.fromkeys(shard, name)
    total = sum(nbytes(*entry) for entry in wanted.values())
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
    folder = published.open_folder(source)
    shared = [name for name in checkpoint.parts if name in folder.parts]
    if folder.family != checkpoint.family or not shared:
        raise UserError(
            f"{source} holds {folder.family}'s {', '.join(folder.parts)}, {checkpoint.folder} "
            f"{checkpoint.family}'s {', '.join(checkpoint.parts)}: nothing to compare"
        )
    total = sum(t.nbytes for name in shared for t in folder.parts[name].tensors.values())
    found = collections.defaultdict(Difference)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="verify", disable=not progress,
        dynamic_ncols=True,
    ) as bar:
        for name in shared:
            theirs = folder.parts[name].tensors
            ours = as_published(checkpoint, name, trained if name == "transformer" else None)
            result = found[name]
            result.lines += published.grouped(
                "only in the checkpoint", [k for k in ours.places if k not in theirs]
            )
            result.lines += published.grouped(
                "only in the folder", [k for k in theirs if k not in ours.places]
            )
            for key, tensor in theirs.items():
                if key in ours.places:
                    _compare(key, tensor, ours, result)
                bar.update(tensor.nbytes)
    return dict(found)


def _compare(key: str, tensor: tensors.Tensor, ours: Published, result: Difference) -> None:
    if tensor.shape != ours.shape(key):
        result.lines.append(f"{key}: shape {list(tensor.shape)}, here {list(ours.shape(key))}")
        return
    a, b = tensor.read(), ours.read(key)
    same_dtype = a.dtype == b.dtype
    if not same_dtype:
        a = a.astype(b.dtype)
    if np.array_equal(a.view(np.uint8), np.ascontiguousarray(b).view(np.uint8)):
        result.identical += same_dtype
        result.converted += not same_dtype
        return
    gap = np.abs(a.astype(np.float32) - b.astype(np.float32)).max()
    result.lines.append(f"{key}: differs by up to {gap:.3g}")

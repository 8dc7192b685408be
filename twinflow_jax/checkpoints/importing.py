"""Published folders into our checkpoints, tensor by tensor.

Nothing here holds more than one published tensor and its copies, or one small stacked array.
"""

import dataclasses
import json
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from etils import epath
from tqdm import tqdm

from twinflow_jax import files
from twinflow_jax.checkpoints import imported, published, store, tensors
from twinflow_jax.checkpoints.imported import Imported
from twinflow_jax.checkpoints.published import Part
from twinflow_jax.models.names import Rule

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SMALL = 64 << 20  # bytes of a stacked array that is written whole


def import_folder(
    source: str, target: str, dtype: str | None = None, pieces: int = 1, progress: bool = True
) -> Imported:
    """Writes a published folder as an imported checkpoint.

    dtype: of what the networks compute with (default: the source's, tensor by tensor); what is
    only carried along keeps its own. pieces: parts of each weight along its input dimension
    that can be read alone: the number of devices that will share it.

    Raises:
      UserError: the folder has problems (all are listed), the target is taken, or there is no
        room; nothing is left behind.
    """
    folder = published.open_folder(source)
    target = epath.Path(target)
    wanted = DTYPES[dtype] if dtype else None
    plans = {name: list(_arrays(part, wanted)) for name, part in folder.parts.items()}
    carried = {name: _carried(part) for name, part in folder.parts.items()}
    total = sum(plan.nbytes for plan in sum(plans.values(), [])) + sum(
        tensor.nbytes for kept in carried.values() for tensor in kept.values()
    )
    with files.whole_folder(target, total), tqdm(
        total=total, unit="B", unit_scale=True, desc="import", disable=not progress,
        dynamic_ncols=True, smoothing=0.05,
    ) as bar:
        for name in folder.parts:
            for plan in plans[name]:
                place = imported.array_folder(target, name, plan.path)
                _write(place, plan, pieces, bar)
            for key, tensor in carried[name].items():
                place = imported.carried_folder(target, name, key)
                array = store.create(place, tensor.shape, tensor.dtype)
                array.write(tensor.read()).result()
                bar.update(tensor.nbytes)
        for name in folder.files:
            files.write(target / "files" / name, (folder.path / name).read_bytes())
        record = {
            "format": imported.FORMAT, "family": folder.family, "source": str(source),
            "files": list(folder.files),
            "networks": {
                name: {
                    "published": part.published, "carried": sorted(carried[name]),
                    "added": list(part.added),
                }
                for name, part in folder.parts.items()
            },
        }
        files.write(target / imported.RECORD, json.dumps(record, indent=2).encode())
    return imported.open_imported(target)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array to be written: the source tensors of its layers (one where not stacked)."""

    path: str
    rule: Rule
    sources: tuple[tensors.Tensor, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def slice(self, layer: int) -> np.ndarray:
        return self.rule.ours(self.sources[layer].read().astype(self.dtype, copy=False))


def _arrays(part: Part, dtype: np.dtype | None) -> Iterator[Array]:
    leaves = imported.leaf_paths(part.config, part.network)
    for rule in part.table.rules:
        keys = part.table.keys(rule)
        if keys[0] in part.added:
            keys = [rule.copy_of]
        sources = tuple(part.tensors[key] for key in keys)
        theirs = _widest({source.dtype for source in sources})
        yield Array(rule.path, rule, sources, leaves[rule.path].shape, dtype or theirs)


def _widest(dtypes: set[np.dtype]) -> np.dtype:
    """The one dtype of several layers, or the one that holds them all."""
    return dtypes.pop() if len(dtypes) == 1 else DTYPES["float32"]


def _carried(part: Part) -> dict[str, tensors.Tensor]:
    return {key: t for key, t in part.tensors.items() if part.table.is_carried(key)}


def _write(place: epath.Path, plan: Array, pieces: int, bar: tqdm) -> None:
    """Writes one array; a large stack layer by layer."""
    stacked = plan.rule.stacked
    if not stacked or plan.nbytes <= SMALL:
        slices = [plan.slice(layer) for layer in range(len(plan.sources))]
        array = store.create(place, plan.shape, plan.dtype, pieces=1 if stacked else pieces)
        array.write(np.stack(slices) if stacked else slices[0]).result()
        bar.update(plan.nbytes)
        return
    array = store.create(place, plan.shape, plan.dtype, by_layer=True, pieces=pieces)
    for layer in range(len(plan.sources)):
        array[layer].write(plan.slice(layer)).result()
        bar.update(plan.nbytes // len(plan.sources))

"""Published folders into our checkpoints, tensor by tensor.

Nothing here holds more than one published tensor and its copies, or one small stacked array.
"""

import codecs
import dataclasses
import json
from collections.abc import Iterator

import numpy as np
from etils import epath
from tqdm import tqdm

from twinflow_jax import files
from twinflow_jax.checkpoints import card, imported, published, store, tensors
from twinflow_jax.checkpoints.imported import Imported
from twinflow_jax.checkpoints.published import Part
from twinflow_jax.models.names import Rule

FILE = 64 << 20  # bytes of an array that share a file; a layer of a larger one has its own


def import_folder(
    source: str, target: str, dtype: str | None = None, pieces: int = 1, progress: bool = True,
    family: str | None = None,
) -> Imported:
    """Writes a published folder as an imported checkpoint.

    dtype: of what the networks compute with (default: the source's, tensor by tensor); what is
    only carried along keeps its own. pieces: parts of each weight along its input dimension
    that can be read alone: the number of devices that will share it. family: whose the folder is,
    where its networks are of several.

    Raises:
      UserError: the folder has problems (all are listed), the target is taken, or there is no
        room; nothing is left behind.
    """
    folder = published.open_folder(source, family)
    target = epath.Path(target)
    wanted = np.dtype(dtype) if dtype else None
    plans = {name: _plans(part, wanted) for name, part in folder.parts.items()}
    carried = {name: _carried(part) for name, part in folder.parts.items()}
    total = sum(plan.nbytes for plan in sum(plans.values(), [])) + sum(
        tensor.nbytes for kept in carried.values() for tensor in kept.values()
    )
    with files.whole_folder(target, total), store.bytes_bar("import", total, progress) as bar:
        for name in folder.parts:
            _write_arrays(target, name, plans[name], pieces, bar)
            if carried[name]:
                _write_carried(imported.carried_file(target, name), carried[name], bar)
        for name in folder.files:
            data = (folder.path / name).read_bytes()
            if name.endswith(".json"):  # whose readers may refuse a byte order mark
                data = data.removeprefix(codecs.BOM_UTF8)
            files.write(target / "files" / name, data)
        record = {
            "format": imported.FORMAT, "family": folder.family, "source": str(source),
            "files": list(folder.files),
            "networks": {
                name: {
                    "published": part.published, "carried": sorted(carried[name]),
                    "added": list(part.added), "widened": _widened(part, plans[name]),
                }
                for name, part in folder.parts.items()
            },
        }
        if not epath.Path(source).is_dir():
            record["hub"] = "/".join(source.split("/")[:2])
        if found := card.licence(folder.path):
            record["licence"] = found
        files.write(target / imported.RECORD, json.dumps(record, indent=2).encode())
    return imported.open_imported(target)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A tensor that no file holds: normal random values, which only its key decides."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    scale: float

    def read(self) -> np.ndarray:
        rng = np.random.default_rng(list(self.key.encode()))
        return rng.normal(0.0, self.scale, self.shape).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One array to be written: the source tensors of its layers (one where not stacked)."""

    rule: Rule
    sources: dict[str, tensors.Tensor | Drawn]
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return tensors.nbytes(self.dtype, self.shape)

    @property
    def rows(self) -> int:
        """Of the first axis, that are written at once: a layer, or FILE bytes."""
        if self.nbytes <= FILE:
            return self.shape[0]
        return 1 if self.rule.stacked else max(1, FILE * self.shape[0] // self.nbytes)

    def part(self, pieces: int) -> tuple[int, ...]:
        """The shape of what can be read alone: a file's share along the input dimension.

        The input dimension is the first, or that after the layers; what does not divide stays
        whole, and so do vectors.
        """
        shape = [self.rows, *self.shape[1:]]
        axis = 1 if self.rule.stacked else 0
        if len(shape) > axis + 1 and shape[axis] % pieces == 0:
            shape[axis] //= pieces
        return tuple(shape)

    def blocks(self) -> Iterator[np.ndarray]:
        """The array in parts of `rows` rows."""
        sources = list(self.sources.values())
        whole = None if self.rule.stacked else self.rule.ours(sources[0].read())
        for start in range(0, self.shape[0], self.rows):
            stop = min(start + self.rows, self.shape[0])
            block = np.empty((stop - start, *self.shape[1:]), self.dtype)
            if whole is None:
                for row, source in zip(block, sources[start:stop], strict=True):
                    tensors.assign(row, self.rule.ours(source.read()))
            else:
                tensors.assign(block, whole[start:stop])
            yield block


def _plans(part: Part, dtype: np.dtype | None) -> list[Plan]:
    plans = []
    for rule in part.table.rules:
        sources = {key: _source(part, rule, key) for key in part.table.keys(rule)}
        theirs = {source.dtype for source in sources.values()}
        # Layers of several dtypes are stored as the one that holds them all.
        own = theirs.pop() if len(theirs) == 1 else np.dtype(np.float32)
        plans.append(Plan(rule, sources, part.leaves[rule.path], dtype or own))
    return plans


def _source(part: Part, rule: Rule, key: str) -> tensors.Tensor | Drawn:
    """The tensor of a key, or what stands in for it where it is added."""
    if key not in part.added:
        return part.tensors[key]
    if rule.copy_of:
        return part.tensors[rule.copy_of]
    like = next(iter(part.tensors.values()))
    return Drawn(key, like.dtype, rule.theirs_shape(part.leaves[rule.path]), rule.normal)


def _carried(part: Part) -> dict[str, tensors.Tensor]:
    return {key: t for key, t in part.tensors.items() if part.table.is_carried(key)}


def _widened(part: Part, plans: list[Plan]) -> dict[str, str]:
    """The published dtype of each tensor that is stored as a wider one, for export."""
    return {
        key: source.dtype.name
        for plan in plans
        for key, source in plan.sources.items()
        if source.dtype.itemsize < plan.dtype.itemsize
    }


def _write_arrays(
    target: epath.Path, name: str, plans: list[Plan], pieces: int, bar: tqdm
) -> None:
    blocks = ((plan, i, block) for plan in plans for i, block in enumerate(plan.blocks()))
    for plan, i, block in store.ahead(blocks):
        if i == 0:
            array = store.create(
                imported.array_folder(target, name, plan.rule.path), plan.shape, plan.dtype,
                (plan.rows, *plan.shape[1:]), plan.part(pieces),
            )
        start = i * plan.rows
        store.write(array[start : start + len(block)], block)
        bar.update(block.nbytes)


def _write_carried(file: epath.Path, carried: dict[str, tensors.Tensor], bar: tqdm) -> None:
    def read() -> Iterator[np.ndarray]:
        for tensor in carried.values():
            yield tensor.read()
            bar.update(tensor.nbytes)

    tensors.write(file, {key: (t.dtype, t.shape) for key, t in carried.items()}, read())

"""Adapters of runs, and imported ones, into files; and into the weights that they are on."""

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath
from jaxtyping import Float

from twinflow_jax import files, models
from twinflow_jax.checkpoints import adapter_files, dialects, exporting, imported, store, tensors
from twinflow_jax.checkpoints.adapter_files import Adapter, Place, Places
from twinflow_jax.checkpoints.imported import Imported
from twinflow_jax.config import Run
from twinflow_jax.errors import UserError
from twinflow_jax.models import adapters
from twinflow_jax.models.family import Network


@dataclasses.dataclass(frozen=True)
class Trained:
    """The dialects.LowRank of a run."""

    a: ts.TensorStore
    b: ts.TensorStore
    spot: Place

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.a.shape[-1], *self.spot.channels

    def read(self) -> tuple[Float[np.ndarray, "rank in"], Float[np.ndarray, "out rank"]]:
        layer = () if self.spot.layer is None else self.spot.layer
        a, b = (store.read(leaf[layer]).astype(np.float32) for leaf in (self.a, self.b))
        return a.T, self.spot.rule.theirs(b)


def export_trained(
    run: Run, arrays: store.Arrays, base: store.Arrays, step: int, target: epath.PathLike,
    form: str, dtype: str | None = None,
) -> epath.Path:
    """Writes a run's adapters to a folder; returns their file.

    arrays: of its checkpoint, whole. base: those that its adapters are on. form: one of
    dialects.FORMATS. dtype: of the file, default float32, as they were trained.
    Raises:
      UserError: no file can hold them, or the target is taken.
    """
    network = _network(run.model.name)
    spots, table = adapter_files.places(network, run.model), imported.layout(network, run.model)[0]
    low = {
        name: Trained(arrays[f"{spot.path}/lora_a"], arrays[f"{spot.path}/lora_b"], spot)
        for name, spot in spots.items() if f"{spot.path}/lora_a" in arrays
    }
    frozen = re.compile(run.adapter.frozen)
    whole = {
        key: exporting.Stored(arrays[rule.path], rule, layer if rule.stacked else None)
        for rule in table.rules
        if not frozen.fullmatch(rule.path)
        for layer, key in enumerate(table.keys(rule))
    }
    # At r = t alone, where nothing but flow matching is, a second embedder is not seen.
    few, time = run.objective.learns_jumps, run.model.time_conditioning
    edits = run.shape.references
    said = {
        "family": run.model.name, "base": _name(run.train.init_from),
        "base_digest": adapter_files.base_digest(base, table), "rank": run.adapter.rank,
        "alpha": run.adapter.rank, "targets": ",".join(run.adapter.targets),
        "time": time if few or time != "second_embedder" else "",
        "objective": run.objective.form, "order": getattr(run.objective, "order", ""),
        "sampler": dialects.FEW if few else "base", "step": step,
        "whole": ",".join(run.adapter.whole) if whole else "",
        "latents": "x".join(map(str, run.model.sample_shape[:2])) if edits else "",
    }
    said = {f"{dialects.OURS}{key}": str(value) for key, value in said.items() if value != ""}
    return _write(target, run.model.name, form, low, spots, dtype or "float32", said, whole)


def export_imported(
    folder: epath.PathLike, target: epath.PathLike, form: str | None = None,
    dtype: str | None = None,
) -> epath.Path:
    """Writes an imported adapter to a folder; returns its file.

    form: as `export_trained`; None: as it came, byte for byte. dtype: default as it came.
    Raises:
      UserError: as `export_trained`.
    """
    record, target = adapter_files.read_record(folder), epath.Path(target)
    network = _network(record["family"])
    config = network.config.from_published(record["published"])
    adapter = adapter_files.open_adapter(folder, network, config, free=True)
    path = adapter.file.path
    if form is None:
        with files.whole_folder(target, path.stat().length):
            adapter_files.keep(adapter, target, path.name)
        return target / path.name
    dtype = dtype or adapter.file.dtype.name
    spots = adapter_files.places(network, adapter.config)
    return _write(
        target, record["family"], form, adapter.file.low, spots, dtype, adapter.said, adapter.whole
    )


def _network(family: str) -> Network:
    text_to_image = models.FAMILIES[family].text_to_image
    if text_to_image is None:
        raise UserError(f"{family} has no published transformer whose adapters files can hold")
    return text_to_image.networks["transformer"]


def _name(source: str) -> str:
    """Of what adapters are on, as people say it: the last part of a hub's id or of a path."""
    if source and adapter_files.is_imported(source):
        source = adapter_files.read_record(source)["base"]
    if source and imported.is_imported(source):
        source = imported.open_imported(source).record["source"]
    return epath.Path(source).name


README = """\
# {name}

Adapters (LoRA) written by twinflow_jax for `{base}`: `{file}`, alpha = rank.
{notes}"""
SECOND = """
The network was told the target time r by a second embedder, E1(t) + E2(r) (t - r), which loaders
of adapters do not have: what they load computes r = t, right for many steps and wrong for few. For
few steps use `twinflow_jax` (`sample --adapter`).
"""
STOCK = """
The network was told the target time r so that at r = 0, where few steps are drawn, it is the
published one with these adapters: any pipeline that loads them draws in few steps.
"""
EDITS = """
It was trained on edits whose result and sources have {latents} latents (height x width): give it
pictures of that area. diffusers and ComfyUI encode sources in about a megapixel; `twinflow_jax`
takes the size that it was trained for.
"""
BESIDE = f"""
`{dialects.WHOLE}` holds weights that trained whole beside the adapters. Loaders of adapters do not
take it; `twinflow_jax` does, where both files lie together.
"""


def _write(
    target: epath.PathLike, family: str, form: str, low: Mapping[str, dialects.LowRank],
    spots: Places, dtype: str, said: Mapping[str, str],
    whole: Mapping[str, exporting.Stored | tensors.Tensor],
) -> epath.Path:
    """A folder with adapters in a form, what goes with them, and a README that says so."""
    if form not in (forms := models.FAMILIES[family].adapter_forms or tuple(dialects.FORMATS)):
        raise UserError(f"no tool loads adapters of {family} as {form}: use {' or '.join(forms)}")
    target, kind = epath.Path(target), np.dtype(dtype)
    shapes = {key: (kind, whole[key].shape) for key in sorted(whole)}
    total = sum(kind.itemsize * one.shape[0] * sum(one.shape[1:]) for one in low.values())
    total += sum(tensors.nbytes(*entry) for entry in shapes.values())
    with files.whole_folder(target, total):
        ones = {name: spots[name].ones for name in low}
        file = dialects.write(target, form, low, ones, kind, said)
        if whole:
            arrays = (tensors.contiguous(whole[key].read()).astype(kind) for key in shapes)
            tensors.write(target / dialects.WHOLE, shapes, arrays)
        time = said.get("twinflow_time", "")
        notes = SECOND if time == "second_embedder" else STOCK if time else ""
        if latents := said.get("twinflow_latents"):
            notes += EDITS.format(latents=latents)
        notes += BESIDE if whole else ""
        readme = README.format(
            name=target.name, base=said.get("twinflow_base") or family, file=file.name, notes=notes
        )
        files.write(target / "README.md", readme.encode())
    return file


def merge(
    checkpoint: Imported, adapter: Adapter, factor: float, target: epath.PathLike,
    progress: bool = True,
) -> float:
    """Writes an imported checkpoint whose transformer has an adapter in its weights.

    It is added in float32 and the sum cast once, to the dtype of the weights. Returns what that
    cost: the error of what the weights gained, relative to what they should have.
    Raises:
      UserError: the adapter is of another base, or the target is taken.
    """
    adapter_files.refuse_other_base(adapter, checkpoint)
    network, arrays = checkpoint.network("transformer"), checkpoint.arrays("transformer")
    leaves = adapter_files.put([(adapter, factor)], network, adapter.config)
    kernels = {path: arrays[f"{path}/kernel"] for path in adapters.ranks_of(leaves)}
    whole = {path: leaf for path, leaf in leaves.items() if not adapters.is_adapter(path)}
    place = lambda folder, path: imported.array_folder(folder, "transformer", path)
    changed = [*whole, *(f"{path}/kernel" for path in kernels)]
    changed = {place(checkpoint.folder, path) for path in changed}
    kept = list(_files(checkpoint.folder, changed | {checkpoint.folder / imported.RECORD}))
    total = sum(file.stat().length for file in kept) + sum(
        tensors.nbytes(one.dtype.numpy_dtype, one.shape)
        for one in (*kernels.values(), *whole.values())
    )
    target, lost, wanted = epath.Path(target), 0.0, 0.0
    with files.whole_folder(target, total), store.bytes_bar("merge", total, progress) as bar:
        for file in kept:
            there = target / file.relative_to(checkpoint.folder)
            there.parent.mkdir(parents=True, exist_ok=True)
            file.copy(there)
            bar.update(file.stat().length)
        for path, leaf in whole.items():
            like = arrays.get(path, next(iter(kernels.values())))
            values = store.read(leaf).astype(like.dtype.numpy_dtype)
            store.write(store.create(place(target, path), values.shape, values.dtype), values)
            bar.update(values.nbytes)
        for path, old in kernels.items():
            layout = old.chunk_layout
            new = store.create(
                place(target, f"{path}/kernel"), old.shape, old.dtype.numpy_dtype,
                layout.write_chunk.shape, layout.read_chunk.shape,
            )
            a, b = (store.read(leaves[f"{path}/{leaf}"]) for leaf in ("lora_a", "lora_b"))
            rows = layout.write_chunk.shape[0]  # of the input, or layers
            for start in range(0, old.shape[0], rows):
                part = slice(start, start + rows)
                before = store.read(old[part])
                delta = a[part] @ (b[part] if a.ndim == 3 else b)
                after = (before.astype(np.float32) + delta).astype(before.dtype)
                store.write(new[part], after)
                gained = after.astype(np.float32) - before.astype(np.float32)
                lost += float(np.square(gained - delta, dtype=np.float64).sum())
                wanted += float(np.square(delta, dtype=np.float64).sum())
                bar.update(before.nbytes)
        record = json.dumps(_merged(checkpoint, adapter, factor), indent=2)
        files.write(target / imported.RECORD, record.encode())
    return (lost / wanted) ** 0.5 if wanted else 0.0


def _merged(checkpoint: Imported, adapter: Adapter, factor: float) -> dict[str, Any]:
    """The record of a checkpoint with an adapter in it."""
    if adapter.time:
        checkpoint = checkpoint.knowing_r(adapter.config)
    source = f"{checkpoint.record['source']}, with {factor:g} x {adapter.file.path.name} in it"
    return checkpoint.record | {"source": source}


def _files(folder: epath.Path, but: Collection[epath.Path]) -> Iterator[epath.Path]:
    """All files in a folder and its folders, but for those."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry not in but:
            yield from _files(entry, but)
        elif entry not in but:
            yield entry

"""Adapters from files onto networks, from runs into files, and into the weights themselves.

An imported adapter is a folder with the file as it came, so that nothing of it is lost, and what
only somebody else knows:

    DST/adapter.json          the checkpoint that it is for, and what alpha was said to be
    DST/adapter.safetensors   the file (adapter_model.safetensors, of peft), and what belongs to it
"""

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath
from jaxtyping import Float

from twinflow_jax import files, models
from twinflow_jax.checkpoints import dialects, exporting, imported, store, tensors
from twinflow_jax.checkpoints.imported import Imported
from twinflow_jax.config import Run
from twinflow_jax.errors import UserError, few
from twinflow_jax.models import adapters, names
from twinflow_jax.models.conditioning import TIMES
from twinflow_jax.models.family import Network
from twinflow_jax.models.names import Rule

RECORD = "adapter.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the adapter of a published module lies: of a layer, where there are several. ones:
    trailing axes of length 1 that its published weight has."""

    path: str
    rule: Rule
    layer: int | None
    channels: tuple[int, int]
    ones: int


Places = dict[str, Place]  # by published name


def places(network: Network, config) -> Places:
    """Of a network's modules.

    Raises:
      UserError: nothing publishes the network, so that its modules have no names in files.
    """
    table, leaves = imported.layout(network, config)
    paths, found = adapters.names_of(table), {}
    if not paths:
        raise UserError(f"{config.name} has no published transformer whose adapters files can hold")
    for rule in table.rules:
        path = rule.path.removesuffix("/kernel")
        if path in paths:
            ones, rule = names.LAYOUTS[rule.layout][1], dataclasses.replace(rule, layout="linear")
            for layer, key in enumerate(table.keys(rule)):
                found[key.removesuffix(".weight")] = Place(
                    path, rule, layer if rule.stacked else None, leaves[rule.path].shape[-2:], ones
                )
    return found


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is put on a network: low-rank adapters and, by published key, weights that trained whole
    beside them and take the others' place. config: of the network, as they were trained on it."""

    file: dialects.AdapterFile
    whole: dict[str, tensors.Tensor]
    config: Any

    @property
    def said(self) -> dict[str, str]:
        """What its header says of where it comes from, {} for others' files."""
        return self.file.ours

    def leaves(self, spots: Places, table: names.NameTable) -> dict[str, np.ndarray]:
        """As parameters of the network, by path, float32: ranks of layers are filled up with zeros
        to the largest."""
        ranks: dict[str, int] = {}
        for name, low in self.file.low.items():
            path = spots[name].path
            ranks[path] = max(ranks.get(path, 0), low.shape[0])
        made = {}
        for name, low in self.file.low.items():
            spot, (a, b) = spots[name], low.read()
            (into, out), rank = spot.channels, ranks[spot.path]
            layers = () if spot.layer is None else (table.layers,)
            for leaf, shape, part in (
                ("lora_a", (into, rank), a.T), ("lora_b", (rank, out), spot.rule.ours(b)),
            ):
                whole = made.setdefault(
                    f"{spot.path}/{leaf}", np.zeros((*layers, *shape), np.float32)
                )
                own = whole if spot.layer is None else whole[spot.layer]
                own[: part.shape[0], : part.shape[1]] = part
        for rule in table.rules:
            if (keys := table.keys(rule)) and keys[0] in self.whole:
                parts = [rule.ours(self.whole[key].read().astype(np.float32)) for key in keys]
                made[rule.path] = np.stack(parts) if rule.stacked else parts[0]
        return made


def base_digest(arrays: Mapping[str, Any], table: names.NameTable) -> str:
    """Of the weights that adapters are on: the same in whichever dtype they are, and whatever was
    added to them to know their target time."""
    known = [rule.path for rule in table.rules if not rule.optional and rule.path in arrays]
    return store.fingerprint({path: arrays[path] for path in known})


def is_imported(folder: epath.PathLike) -> bool:
    return (epath.Path(folder) / RECORD).exists()


def read_record(folder: epath.PathLike) -> dict[str, Any]:
    """What is known of an imported adapter beside its file.

    Raises:
      UserError: it cannot be read.
    """
    path = epath.Path(folder) / RECORD
    try:
        record = json.loads(path.read_text())
        known = record["format"] == FORMAT and record["family"] in models.FAMILIES
        known = known and {"base", "alpha", "published"} <= record.keys()
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): import again") from error
    if not known:
        raise UserError(f"{path} is of another version of this project: import again")
    return record


def open_adapter(
    source: epath.PathLike, network: Network, config, free: bool, alpha: float | None = None
) -> Adapter:
    """A file of adapters, the folder of one, or an imported one, for a network of a config.

    free: whether the network's weights know no target time yet, so that it is the adapter's to say
    how they are told. alpha: of all modules, in place of what the file says.
    Raises:
      UserError: it cannot be read, or does not fit: modules, shapes, or the time conditioning.
    """
    source = epath.Path(source)
    if is_imported(source):
        alpha = read_record(source)["alpha"]
    texts = tensors.metadata(dialects.find(source))
    mine, theirs = config.time_conditioning, texts.get("twinflow_time", config.time_conditioning)
    if theirs != mine and not (free and theirs in TIMES):
        raise UserError(
            f"{source} was trained with the time conditioning {theirs}, this network with {mine}: "
            "take one with the same"
        )
    config = dataclasses.replace(config, time_conditioning=theirs)
    modules = {name: spot.channels for name, spot in places(network, config).items()}
    file = dialects.read(source, modules, alpha)
    if "twinflow_whole" not in file.ours:
        return Adapter(file, {}, config)
    beside = file.path.parent / dialects.WHOLE
    if not beside.exists():
        raise UserError(
            f"{file.path} trained together with weights that are in {dialects.WHOLE}, which is "
            "not beside it: keep them together"
        )
    whole, (table, leaves) = tensors.read_header(beside), imported.layout(network, config)
    shapes = table.shapes({path: leaf.shape for path, leaf in leaves.items()})
    wrong = [key for key, tensor in whole.items() if shapes.get(key) != tensor.shape]
    halves = [
        key for rule in table.rules for key in table.keys(rule)
        if key not in whole and not whole.keys().isdisjoint(table.keys(rule))
    ]
    if wrong or halves:
        raise UserError(f"{beside} is not of this network: {few(wrong + halves)}")
    return Adapter(file, whole, config)


def other_base(adapter: Adapter, arrays: Mapping[str, Any], table: names.NameTable) -> str:
    """What to say where the weights are not those that it was trained on; "" otherwise."""
    said = adapter.said
    if said.get("twinflow_base_digest", (mine := base_digest(arrays, table))) == mine:
        return ""
    base = f"{said.get('twinflow_base', '')} ({said['twinflow_base_digest']})"
    return f"was trained on other weights, {base}, than these ({mine})"


def put(
    given: Sequence[tuple[Adapter, float]], network: Network, config,
    arrays: Mapping[str, Any] | None = None,
) -> store.Arrays:
    """The leaves that adapters, each with a factor, become on a network. Several add up: side by
    side, they are one of all ranks together. arrays: the network's, which may have adapters too.

    Raises:
      UserError: weights that trained whole would be there twice, or multiplied.
    """
    spots, table = places(network, config), imported.layout(network, config)[0]
    parts: dict[str, list[np.ndarray]] = {
        path: [store.read(array).astype(np.float32)]
        for path, array in (arrays or {}).items() if adapters.is_adapter(path)
    }
    for adapter, factor in given:
        if adapter.whole and (factor != 1 or any(one.whole for one, _ in given if one is not adapter)):
            raise UserError(
                f"{adapter.file.path} has weights that trained whole, which neither take a factor "
                "nor go beside others': use it alone of its kind, as it is"
            )
        for path, leaf in adapter.leaves(spots, table).items():
            scaled = leaf * np.float32(factor) if path.endswith("/lora_b") else leaf
            parts.setdefault(path, []).append(scaled)
    joined = lambda path, leaves: leaves[0] if len(leaves) == 1 else np.concatenate(
        leaves, axis=-1 if path.endswith("/lora_a") else -2
    )
    return {path: ts.array(joined(path, leaves)) for path, leaves in parts.items()}


def import_adapter(
    source: epath.PathLike, checkpoint: Imported, target: epath.PathLike,
    alpha: float | None = None,
) -> Adapter:
    """Keeps a file of adapters, with what belongs to it, for an imported checkpoint.

    alpha: as `open_adapter` takes it.
    Raises:
      UserError: it does not fit the checkpoint, is of another base, or the target is taken.
    """
    adapter = open_for(checkpoint, source, alpha)
    _refuse_other_base(adapter, checkpoint)
    record = {
        "format": FORMAT, "family": checkpoint.family, "source": str(source), "alpha": alpha,
        "base": str(checkpoint.folder),
        "published": checkpoint.recorded("transformer")["published"],
    }
    path, target = adapter.file.path, epath.Path(target)
    with files.whole_folder(target, path.stat().length):
        peft = path.name == dialects.FORMATS["peft"].file
        path.copy(target / (path.name if peft else "adapter.safetensors"))
        _copy_beside(path, target)
        files.write(target / RECORD, json.dumps(record, indent=2).encode())
    return adapter


def _copy_beside(path: epath.Path, target: epath.Path) -> None:
    """Copies what belongs to a file of adapters."""
    for name in (dialects.BESIDE, dialects.WHOLE):
        if (path.parent / name).exists():
            (path.parent / name).copy(target / name)


def _refuse_other_base(adapter: Adapter, checkpoint: Imported) -> None:
    table = imported.layout(checkpoint.network("transformer"), checkpoint.config("transformer"))[0]
    if problem := other_base(adapter, checkpoint.arrays("transformer"), table):
        raise UserError(f"{adapter.file.path} {problem}: take the checkpoint of that base")


def open_for(
    checkpoint: Imported, source: epath.PathLike, alpha: float | None = None
) -> Adapter:
    """`open_adapter` for the transformer of an imported checkpoint."""
    network, config = checkpoint.network("transformer"), checkpoint.config("transformer")
    return open_adapter(source, network, config, not checkpoint.knows_r, alpha)


def open_imported(folder: epath.PathLike) -> tuple[Imported, Adapter]:
    """An imported adapter, with the checkpoint that it was imported for.

    Raises:
      UserError: either cannot be read.
    """
    checkpoint = imported.open_imported(read_record(folder)["base"])
    return checkpoint, open_for(checkpoint, folder)


def start(folder: epath.PathLike) -> store.Arrays:
    """The weights of an imported adapter's base, with the adapter on them.

    Raises:
      UserError: as `open_imported`.
    """
    checkpoint, adapter = open_imported(folder)
    network = checkpoint.network("transformer")
    return checkpoint.arrays("transformer") | put([(adapter, 1.0)], network, adapter.config)


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
    spots, table = places(network, run.model), imported.layout(network, run.model)[0]
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
    order = getattr(run.objective, "order", "")
    said = {
        "family": run.model.name, "base": _name(run.train.init_from),
        "base_digest": base_digest(base, table), "rank": run.adapter.rank,
        "alpha": run.adapter.rank, "targets": ",".join(run.adapter.targets),
        "time": run.model.time_conditioning, "objective": run.objective.form, "order": order,
        "sampler": "few steps" if order else "base", "step": step,
    } | ({"whole": ",".join(run.adapter.whole)} if whole else {})
    said = {f"{dialects.OURS}{key}": str(value) for key, value in said.items()}
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
    record, target = read_record(folder), epath.Path(target)
    network = _network(record["family"])
    config = network.config.from_published(record["published"])
    adapter = open_adapter(folder, network, config, free=True)
    path = adapter.file.path
    if form is None:
        with files.whole_folder(target, path.stat().length):
            path.copy(target / path.name)
            _copy_beside(path, target)
        return target / path.name
    dtype = dtype or adapter.file.dtype.name
    return _write(
        target, record["family"], form, adapter.file.low, places(network, adapter.config), dtype,
        adapter.said, adapter.whole,
    )


def _network(family: str) -> Network:
    text_to_image = models.FAMILIES[family].text_to_image
    if text_to_image is None:
        raise UserError(f"{family} has no published transformer whose adapters files can hold")
    return text_to_image.networks["transformer"]


def _name(source: str) -> str:
    """Of what adapters are on, as people say it: the last part of a hub's id or of a path."""
    if source and is_imported(source):
        source = read_record(source)["base"]
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
        time = said.get("twinflow_time")
        notes = (SECOND if time == "second_embedder" else STOCK if time else "")
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
    _refuse_other_base(adapter, checkpoint)
    network, arrays = checkpoint.network("transformer"), checkpoint.arrays("transformer")
    leaves = put([(adapter, factor)], network, adapter.config)
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
    if adapter.said:  # it was trained to know r
        checkpoint = checkpoint.knowing_r(adapter.config.time_conditioning)
    source = f"{checkpoint.record['source']}, with {factor:g} x {adapter.file.path.name} in it"
    return checkpoint.record | {"source": source}


def _files(folder: epath.Path, but: Collection[epath.Path]) -> Iterator[epath.Path]:
    """All files in a folder and its folders, but for those."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry not in but:
            yield from _files(entry, but)
        elif entry not in but:
            yield entry

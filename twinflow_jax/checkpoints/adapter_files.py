"""Adapters from files onto networks, and imports of them.

An imported adapter is a folder with the file as it came, so that nothing of it is lost, and what
only somebody else knows:

    DST/adapter.json          the checkpoint that it is for, and what alpha was said to be
    DST/adapter.safetensors   the file (adapter_model.safetensors, of peft), and what belongs to it
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from twinflow_jax import files, models
from twinflow_jax.checkpoints import dialects, imported, store, tensors
from twinflow_jax.checkpoints.imported import Imported
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

    @property
    def time(self) -> str:
        """The time conditioning that it needs, "" where it goes with any."""
        return self.said.get("twinflow_time", "")

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
            layers = () if spot.layer is None else (spot.rule.layers,)
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
    if latents := texts.get("twinflow_latents"):  # that edits were trained in
        sides = latents.split("x")
        if len(sides) != 2 or not all(map(str.isdecimal, sides)):
            raise UserError(f"{source}: its twinflow_latents are {latents!r}, not HEIGHTxWIDTH")
        shape = *map(int, sides), config.sample_shape[-1]
        config = dataclasses.replace(config, sample_shape=shape)
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
        others = [one for one, _ in given if one is not adapter]
        if adapter.whole and (factor != 1 or any(one.whole for one in others)):
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
    refuse_other_base(adapter, checkpoint)
    record = {
        "format": FORMAT, "family": checkpoint.family, "source": str(source), "alpha": alpha,
        "base": str(checkpoint.folder),
        "published": checkpoint.recorded("transformer")["published"],
    }
    path, target = adapter.file.path, epath.Path(target)
    with files.whole_folder(target, path.stat().length):
        keep(adapter, target, path.name if _is_pefts(path) else "adapter.safetensors")
        files.write(target / RECORD, json.dumps(record, indent=2).encode())
    return adapter


def _is_pefts(path: epath.Path) -> bool:
    return path.name == dialects.FORMATS["peft"].file


def keep(adapter: Adapter, target: epath.Path, name: str) -> None:
    """Copies an adapter's file to a folder under a name, with what belongs to it."""
    path = adapter.file.path
    path.copy(target / name)
    for beside, belongs in ((dialects.BESIDE, _is_pefts(path)), (dialects.WHOLE, adapter.whole)):
        if belongs and (path.parent / beside).exists():
            (path.parent / beside).copy(target / beside)


def refuse_other_base(adapter: Adapter, checkpoint: Imported) -> None:
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

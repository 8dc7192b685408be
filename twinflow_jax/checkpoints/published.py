"""Published folders: what is in them, checked whole before anything is done with it.

A pipeline folder as diffusers writes it (`transformer/`, `vae/`, `text_encoder/`, `tokenizer/`),
or the folder of one network alone. Only headers are read here, and nothing is executed: weights
are safetensors, everything else is JSON or kept as bytes.
"""

import dataclasses
import json
import re
from typing import Any

from etils import epath

from twinflow_jax import models
from twinflow_jax.checkpoints import tensors
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.family import Network

PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
KEPT_FILES_BYTES = 200 << 20  # tokenizers, schedulers and the like; weights are not kept so


@dataclasses.dataclass(frozen=True)
class Part:
    """One network of a folder: its config as published and as ours, and where its tensors lie.

    tensors: by their published key. added: keys that the folder lacks and others stand in for.
    """

    network: Network
    published: dict[str, Any]
    config: Any
    table: names.NameTable
    tensors: dict[str, tensors.Tensor]
    added: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Folder:
    """family: its name in models.FAMILIES. parts: by the family's name for the network.

    files: small files to keep beside the networks, relative to the folder.
    """

    path: epath.Path
    family: str
    parts: dict[str, Part]
    files: tuple[str, ...]


def find(source: str) -> epath.Path:
    """The folder of a path, or of a hub id that is in the local cache.

    Raises:
      UserError: neither.
    """
    folder = epath.Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{source} is a file: give the folder with transformer/ in it")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        import huggingface_hub  # slow to import, and needed here only

        try:
            return epath.Path(huggingface_hub.snapshot_download(source, local_files_only=True))
        except Exception as error:  # it raises many kinds
            raise UserError(
                f"{source} is neither a folder nor in the local hub cache: download it first "
                f"(hf download {source}), or give its folder"
            ) from error
    raise UserError(f"no folder {source}")


def open_folder(source: str) -> Folder:
    """Everything that a folder holds, checked.

    Raises:
      UserError: it is no pipeline of a family we know, or has problems; all of them are listed.
    """
    path = find(source)
    family, places = _networks(path)
    parts, problems = {}, []
    for name, place in places.items():
        network = models.FAMILIES[family].text_to_image.networks[name]
        part, found = _open_part(network, place)
        problems += [f"{place.name}: {problem}" for problem in found]
        parts[name] = part
    if path not in places.values() and not (path / "tokenizer").is_dir():
        problems.append("tokenizer: no such folder; prompts need the one of the text encoder")
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(f"{path} cannot be used:\n  {listed}")
    return Folder(path, family, parts, tuple(_other_files(path, parts)))


def _networks(path: epath.Path) -> tuple[str, dict[str, epath.Path]]:
    """The family's name and where each of its networks lies."""
    known = {
        name: family.text_to_image.networks
        for name, family in models.FAMILIES.items()
        if family.text_to_image
    }
    alone = path / "config.json"
    transformer = path / "transformer" / "config.json"
    if not alone.exists() and not transformer.exists():
        raise UserError(
            f"{path} is no pipeline folder: it has neither transformer/config.json nor config.json"
        )
    file = transformer if transformer.exists() else alone
    published = _json(file)
    given = class_name(published)
    for family, networks in known.items():
        for name, network in networks.items():
            if not network.accepts(given):
                continue
            if file == alone:
                return family, {name: path}
            if name != "transformer":
                continue
            missing = [n.folder for n in networks.values() if not (path / n.folder).is_dir()]
            if missing:
                raise UserError(
                    f"{path} has no {', '.join(f'{m}/' for m in missing)}: give the whole "
                    "pipeline folder, or that of one network alone"
                )
            return family, {name: path / n.folder for name, n in networks.items()}
    classes = [c for networks in known.values() for n in networks.values() for c in n.classes]
    raise UserError(f"{file} is of class {given!r}; known are {', '.join(sorted(set(classes)))}")


def class_name(published: dict[str, Any]) -> str:
    """What a config.json says that it is of: diffusers' or transformers' way."""
    architectures = published.get("architectures") or [published.get("model_type", "")]
    return str(published.get("_class_name") or architectures[0])


def _open_part(network: Network, folder: epath.Path) -> tuple[Part | None, list[str]]:
    """The network in a folder, and its problems."""
    problems = []
    config = None
    published = {}
    try:
        published = _json(folder / "config.json")
        config = network.config.from_published(published)
    except UserError as error:
        problems.append(str(error))
    found, more = _tensors(folder)
    problems += more
    if config is None or not found:
        return None, problems
    table = network.table(config)
    by_key = {}
    for key, tensor in found.items():
        name = table.published(key)
        if name in by_key:
            problems.append(f"{key}: a second tensor for {name}")
        by_key[name] = tensor
    abstract, _ = network.abstract(config)
    shapes = table.shapes({p: leaf.shape for p, leaf in names.flatten(abstract).items()})
    optional = table.optional()
    added = optional - by_key.keys()
    if added == optional:
        shapes = {key: shape for key, shape in shapes.items() if key not in added}
    else:
        added = set()
    problems += grouped("missing", [key for key in shapes if key not in by_key])
    problems += grouped(
        "unexpected", [k for k in by_key if k not in shapes and not table.is_carried(k)]
    )
    problems += [
        f"{key} has shape {list(by_key[key].shape)}, its config.json asks for {list(shape)}"
        for key, shape in shapes.items()
        if key in by_key and by_key[key].shape != shape
    ]
    problems += [
        f"{key} is {tensor.dtype}: weights are floating point here"
        for key, tensor in by_key.items()
        if key in shapes and tensor.dtype.name not in ("float32", "float16", "bfloat16")
    ]
    return Part(network, published, config, table, by_key, tuple(sorted(added))), problems


def _tensors(folder: epath.Path) -> tuple[dict[str, tensors.Tensor], list[str]]:
    """All tensors of a folder by the keys in its files, and the problems with them."""
    if not folder.is_dir():
        return {}, ["no such folder"]
    listing = sorted(file.name for file in folder.iterdir())
    indices = [name for name in listing if name.endswith(".safetensors.index.json")]
    files = [name for name in listing if name.endswith(".safetensors")]
    if not indices and not files:
        pickled = [name for name in listing if name.endswith(PICKLED)]
        if pickled:
            return {}, [
                f"{pickled[0]} is a pickle, which can run code when it is read: save the weights "
                "as safetensors"
            ]
        return {}, ["no safetensors file"]
    problems: list[str] = []
    place: dict[str, str] = {}  # file of each key, where there is an index
    if len(indices) > 1 or (not indices and len(files) > 1):
        many = ", ".join(indices or files)
        return {}, [f"several sets of weights ({many}): leave one"]
    if indices:
        index = folder / indices[0]
        try:
            place = dict(_json(index)["weight_map"])
            outside = {n for n in place.values() if not re.fullmatch(r"[\w.-]+\.safetensors", n)}
        except (KeyError, TypeError, ValueError) as error:
            return {}, [f"{index.name} is no index of safetensors ({error!r})"]
        if outside:
            return {}, [f"{index.name} points to {n!r}, no file of this folder" for n in outside]
        files = sorted(set(place.values()))
    found: dict[str, tensors.Tensor] = {}
    for name in files:
        if name not in listing:
            problems.append(f"{name} is missing, one of {len(files)} shards")
            continue
        try:
            header = tensors.read_header(folder / name)
        except UserError as error:
            problems.append(str(error))
            continue
        if indices:
            lost = [k for k, n in place.items() if n == name and k not in header]
            problems += grouped(f"not in {name}, where the index puts it", lost)
            problems += grouped(f"in {name}, not in the index", list(header.keys() - place.keys()))
        found |= header
    return found, problems


def grouped(what: str, keys: list[str]) -> list[str]:
    """One line for all keys that differ in their layer number only."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", key), []).append(key)
    return [
        f"{what}: {members[0]}"
        + (f" and {len(members) - 1} more like {pattern}" if len(members) > 1 else "")
        for pattern, members in groups.items()
    ]


def _other_files(path: epath.Path, parts: dict[str, Part]) -> list[str]:
    """Files to keep for export: of the folder itself and of its folders without weights."""
    networks = {part.network.folder for part in parts.values()}
    kept = []
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and entry.name not in networks and not entry.name.startswith("."):
            kept += [f"{entry.name}/{f.name}" for f in sorted(entry.iterdir()) if f.is_file()]
        elif entry.is_dir() and entry.name in networks:
            kept += [
                f"{entry.name}/{f.name}"
                for f in sorted(entry.iterdir())
                if f.suffix == ".json" and f.name != "config.json" and "index" not in f.name
            ]
        elif entry.name == "model_index.json":
            kept.append(entry.name)
    return [
        name for name in kept
        if re.fullmatch(r"[\w./-]+", name)
        and not name.endswith((*PICKLED, ".safetensors", ".py"))
        and (path / name).stat().length <= KEPT_FILES_BYTES
    ]


def _json(file: epath.Path) -> dict[str, Any]:
    if not file.exists():
        raise UserError(f"no {file.name}")
    try:
        value = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{file.name} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file.name} is no JSON object")
    return value

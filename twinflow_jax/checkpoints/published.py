"""Published folders: what is in them, checked whole before anything is done with it.

A pipeline folder as diffusers writes it (`transformer/`, `vae/`, `text_encoder/`, `tokenizer/`),
or the folder of one network alone. Only headers are read here, and nothing is executed: weights
are safetensors, everything else is JSON or kept as bytes.
"""

import dataclasses
import json
import os.path
import re
from collections.abc import Collection
from typing import Any

from etils import epath

from twinflow_jax import files, models
from twinflow_jax.checkpoints import imported, tensors
from twinflow_jax.errors import UserError, reason
from twinflow_jax.models import names
from twinflow_jax.models.family import Network, TextToImage

PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
PICKLE = (
    "is a pickle, which can run code when it is read: save the weights as safetensors (of OpenUni, "
    "with tools/openuni.py)"
)
FLOATS = ("float32", "float16", "bfloat16")
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
PROCESSORS = ("processor/preprocessor_config.json", "tokenizer/preprocessor_config.json")
BESIDE_WEIGHTS = (".json", ".txt", ".model")  # the kept files among a network's
# What compiling, sharding and checkpointing a PyTorch module puts into its tensors' names.
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
KEPT_FILES_BYTES = 200 << 20  # tokenizers, schedulers and the like; weights are not kept so


@dataclasses.dataclass(frozen=True)
class Part:
    """One network of a folder: its config as published and as ours, and where its tensors lie.

    leaves: shapes of our leaves by path. tensors: by their published key. added: keys that the
    folder lacks and others stand in for.
    """

    network: Network
    published: dict[str, Any]
    config: Any
    table: names.NameTable
    leaves: dict[str, tuple[int, ...]]
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

    A hub id may be followed by a folder of the repository: ORGANISATION/NAME/FOLDER.
    Raises:
      UserError: neither.
    """
    folder = epath.Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        pickled = folder.name.endswith(PICKLED)
        what = PICKLE if pickled else "is a file: give the folder with transformer/ in it"
        raise UserError(f"{source} {what}")
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?", source)
    if not hub:
        raise UserError(f"no folder {source}")
    import huggingface_hub  # slow to import, and needed here only

    try:
        snapshot = huggingface_hub.snapshot_download(hub[1], local_files_only=True)
    except Exception as error:  # it raises many kinds
        raise UserError(
            f"{source} is neither a folder nor in the local hub cache: download it first "
            f"(hf download {hub[1]}), or give its folder"
        ) from error
    folder = epath.Path(snapshot) / (hub[2] or "")
    if not folder.is_dir():
        raise UserError(f"{hub[1]} has no folder {hub[2]} in the local hub cache")
    return folder


def open_folder(source: str, family: str | None = None) -> Folder:
    """Everything that a folder holds, checked.

    family: whose it is, where its networks are of several.
    Raises:
      UserError: it is no pipeline of a family we know, or has problems; all of them are listed.
    """
    path = find(source)
    if (path / files.UNFINISHED).exists():
        raise UserError(f"{path} was not written to its end: write it again")
    family, places = _networks(path, family)
    parts, problems = {}, []
    text_to_image = models.FAMILIES[family].text_to_image
    for name, place in places.items():
        network = text_to_image.networks[name]
        part, found = _open_part(network, place)
        problems += [f"{place.name}: {problem}" for problem in found]
        parts[name] = part
    for name, encoder in text_to_image.encoders.items() if path not in places.values() else ():
        folder = path / encoder.tokenizer
        if name in places and not any((folder / name).exists() for name in VOCABULARIES):
            problems.append(f"{folder.name}: holds none of {', '.join(VOCABULARIES)}; prompts "
                            "need it")
    if (path / "model_index.json").exists():
        try:
            _json(path / "model_index.json")
        except UserError as error:
            problems.append(str(error))
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(f"{path} cannot be used:\n  {listed}")
    return Folder(path, family, parts, tuple(_other_files(path, set(places.values()))))


def _networks(path: epath.Path, wanted: str | None) -> tuple[str, dict[str, epath.Path]]:
    """The family's name and where each of its networks lies; wanted: as `open_folder` takes it."""
    every = {k: f.text_to_image for k, f in models.FAMILIES.items() if f.text_to_image}
    if wanted not in (None, *every):
        raise UserError(f"{wanted!r} is no family that draws from text")

    def accepted(networks: dict[str, Network]) -> int:
        return sum(n.accepts(_class_in(path / n.folder)) for n in networks.values())

    pipeline = _pipeline(path)
    owners = {name: one for name, one in every.items() if pipeline in one.pipelines}
    if not pipeline and any((path / place).exists() for place in PROCESSORS):
        # An export of what was imported without a model_index.json has none either.
        pipeline = "network that looks at pictures"
        owners = {
            name: one for name, one in every.items()
            if one.editing and accepted(one.networks) == len(one.networks)
        }
    if wanted and owners and wanted not in owners:
        known = " or ".join(sorted(owners))
        raise UserError(f"{path} is of a {pipeline}: import it with --family {known}")
    shared = {name: one for name, one in every.items() if not one.pipelines}
    known = {wanted: every[wanted]} if wanted else owners or shared
    if (path / "config.json").exists() and not (path / "transformer").exists():
        given = class_name(_json(path / "config.json"))
        found = {
            family: names
            for family, one in known.items()
            if (names := [name for name, n in one.networks.items() if n.accepts(given)])
        }
        if not found:
            raise UserError(f"{path / 'config.json'} {_unknown_class(given, known)}")
        family = _only(found, path)
        if len(found[family]) > 1:
            raise UserError(
                f"{path} may be {' or '.join(found[family])} of {family}: give the whole pipeline"
            )
        return family, {found[family][0]: path}

    for place in ("transformer/config.json", "unet/config.json"):
        given = _class_in((path / place).parent)
        if given and not any(n.accepts(given) for o in known.values() for n in o.networks.values()):
            raise UserError(f"{path / place} {_unknown_class(given, known)}")
    # Families may share networks, and differ in what encodes their text.
    counts = {k: (accepted(one.networks), accepted(one.encoders)) for k, one in known.items()}
    best = max(counts.values())
    if best > (0, 0):
        family = _only([family for family, count in counts.items() if count == best], path)
        networks = known[family].without(_left_out(path, known[family])).networks
        return family, {name: path / n.folder for name, n in networks.items() if n.published}
    raise UserError(
        f"{path} is no pipeline folder: it has neither transformer/config.json nor config.json"
    )


def _pipeline(path: epath.Path) -> str:
    """The class of a pipeline folder, "" where it does not say."""
    try:
        return class_name(_json(path / "model_index.json"))
    except UserError:
        return ""


def _left_out(path: epath.Path, family: TextToImage) -> list[str]:
    """The networks that a pipeline does without, as its model_index.json says."""
    try:
        index = _json(path / "model_index.json")
    except UserError:
        return []
    return [
        name for name, network in family.networks.items()
        if network.optional and index.get(network.folder, ()) in (None, [None, None])
    ]


def _only(families: Collection[str], path: epath.Path) -> str:
    """Raises UserError where there are several."""
    if len(families) > 1:
        raise UserError(
            f"{path} holds what {', '.join(families)} share: say which with --family NAME"
        )
    return next(iter(families))


def _unknown_class(given: str, known: dict[str, TextToImage]) -> str:
    classes = {c for one in known.values() for n in one.networks.values() for c in n.classes}
    return f"is of class {given!r}; known are {', '.join(sorted(classes))}"


def class_name(published: dict[str, Any]) -> str:
    """What a config.json says that it is of: diffusers' or transformers' way."""
    architectures = published.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    return str(published.get("_class_name") or first or published.get("model_type", ""))


def _class_in(folder: epath.Path) -> str:
    """The class of the network in a folder, "" where that cannot be read."""
    try:
        return class_name(_json(folder / "config.json"))
    except UserError:
        return ""


def _open_part(network: Network, folder: epath.Path) -> tuple[Part | None, list[str]]:
    """The network in a folder, and its problems."""
    if not folder.is_dir():
        cure = "give the whole pipeline, or the folder of one network"
        more = ", or null for it in model_index.json" if network.optional else ""
        return None, [f"no such folder: {cure}{more}"]
    try:
        found, unread, problems = _tensors(folder, network.stem)
    except UserError as error:
        found, unread, problems = {}, set(), [str(error)]
    try:
        published = _json(folder / "config.json")
        config = imported.config_of(network, published)
        table, abstract = imported.layout(network, config)
    except UserError as error:
        return None, [str(error), *problems]
    except Exception as error:  # values of the wrong kind: what fails, and how, depends on which
        why = f"{type(error).__name__}: {reason(error)}"
        return None, [f"config.json holds values that make no network ({why})", *problems]
    leaves = {path: leaf.shape for path, leaf in abstract.items()}
    shapes = table.shapes(leaves)
    spelled = _spelled(table, found.keys() | unread, shapes)
    by_key: dict[str, tensors.Tensor] = {}
    for key, tensor in found.items():
        name = spelled[key]
        if name in by_key:
            problems.append(f"{key}: a second tensor for {name}")
        by_key[name] = tensor
    unread = {spelled[key] for key in unread}
    given = by_key.keys() | unread
    added = table.added(given)
    if found:
        problems += grouped("missing", [k for k in shapes if k not in given and k not in added])
    problems += _wrong(table, shapes, by_key)
    return Part(network, published, config, table, leaves, by_key, added), problems


def _spelled(
    table: names.NameTable, keys: Collection[str], wanted: Collection[str]
) -> dict[str, str]:
    """The published spelling of each key, of which a trainer may have put a module into others."""
    bare = {key: WRAPPERS.sub("", key) for key in keys}
    common = os.path.commonprefix(list(bare.values()))
    for start in (0, *(i + 1 for i, letter in enumerate(common) if letter == ".")):
        spelled = {key: table.published(name[start:]) for key, name in bare.items()}
        if not set(wanted).isdisjoint(spelled.values()):
            return spelled
    return {key: table.published(key) for key in keys}


def _wrong(
    table: names.NameTable, shapes: dict[str, tuple[int, ...]], by_key: dict[str, tensors.Tensor]
) -> list[str]:
    """Problems of tensors that are there, by their published key."""
    kinds: dict[str, list[str]] = {}
    for key, tensor in by_key.items():
        wanted = shapes.get(key)
        if wanted is None:
            if not table.is_carried(key):
                kinds.setdefault("unexpected", []).append(key)
            continue
        if tensor.shape != wanted:
            what = f"shape {list(tensor.shape)} where config.json asks for {list(wanted)}"
            kinds.setdefault(what, []).append(key)
        if tensor.dtype.name not in FLOATS:
            what = f"{tensor.dtype} where weights are {', '.join(FLOATS)}"
            kinds.setdefault(what, []).append(key)
    return [line for what, keys in kinds.items() for line in grouped(what, keys)]


def _tensors(
    folder: epath.Path, stem: str
) -> tuple[dict[str, tensors.Tensor], set[str], list[str]]:
    """All tensors of a folder by the keys in its files, keys that cannot be read, problems.

    Raises:
      UserError: no keys can be known, and why.
    """
    listing = sorted(file.name for file in folder.iterdir())
    shards = [name for name in listing if name.endswith(".safetensors")]
    indices = [n for n in listing if re.search(r"\.safetensors\.index(\.\w+)?\.json$", n)]
    # Beside the plain set there may be variants of other precision, which are not looked at.
    plain = [n for n in (f"{stem}.safetensors.index.json", f"{stem}.safetensors") if n in listing]
    sets = plain or indices or shards
    if not sets:
        pickled = [name for name in listing if name.endswith(PICKLED)]
        raise UserError(
            f"{pickled[0]} {PICKLE}" if pickled else "no safetensors file"
        )
    if len(sets) > 1:
        raise UserError(f"{', '.join(sets)}: leave one, or the index that joins them")
    if sets[0] in shards:
        found = tensors.read_header(folder / sets[0])
        return found, set(), [] if found else [f"{sets[0]} holds no tensors"]
    try:
        place = _json(folder / sets[0])["weight_map"]
        outside = {n for n in place.values() if not re.fullmatch(r"[\w.-]+\.safetensors", n)}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{sets[0]} is no index of safetensors ({error!r})") from error
    if outside or not place:
        listed = [f"{sets[0]} points to {name!r}, no file of this folder" for name in outside]
        return {}, set(), sorted(listed) or [f"{sets[0]} lists no tensors"]
    return _indexed(folder, place)


def _indexed(
    folder: epath.Path, place: dict[str, str]
) -> tuple[dict[str, tensors.Tensor], set[str], list[str]]:
    """What `_tensors` does, where an index says which file holds each key."""
    found: dict[str, tensors.Tensor] = {}
    unread: set[str] = set()
    problems: list[str] = []
    shards = sorted(set(place.values()))
    for name in shards:
        keys = [key for key, shard in place.items() if shard == name]
        try:
            if not (folder / name).exists():
                raise UserError(f"{name} is missing, one of {len(shards)} shards")
            header = tensors.read_header(folder / name)
        except UserError as error:
            problems.append(str(error))
            unread |= set(keys)
            continue
        lost = [key for key in keys if key not in header]
        problems += grouped(f"not in {name}, where the index puts it", lost)
        unread |= set(lost)
        other = [key for key in header if place.get(key) != name]
        problems += grouped(f"in {name}, where the index does not put it", other)
        found |= header
    return found, unread, problems


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


def _other_files(path: epath.Path, networks: set[epath.Path]) -> list[str]:
    """Files to keep for export, relative to the folder `path`.

    Its model_index.json, what lies beside weights without being such (a tokenizer may), and all
    of its folders without weights. networks: the folders with weights, which `path` may be.
    """
    def beside_weights(file: epath.Path) -> bool:
        kept = file.suffix in BESIDE_WEIGHTS
        return kept and file.name != "config.json" and "index" not in file.name

    kept = []
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            kept += [
                f"{entry.name}/{f.name}"
                for f in sorted(entry.iterdir())
                if f.is_file() and (entry not in networks or beside_weights(f))
            ]
        elif entry.name == "model_index.json" or (path in networks and beside_weights(entry)):
            kept.append(entry.name)
    return [
        name for name in kept
        if files.is_plain(name)
        and not name.endswith((*PICKLED, ".safetensors", ".py"))
        and (path / name).stat().length <= KEPT_FILES_BYTES
    ]


def _json(file: epath.Path) -> dict[str, Any]:
    if not file.exists():
        raise UserError(f"no {file.name}")
    try:
        value = json.loads(file.read_bytes())  # with or without a byte order mark
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file.name} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file.name} is no JSON object")
    return value

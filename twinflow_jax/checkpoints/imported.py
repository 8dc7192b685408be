"""Imported checkpoints: a family's networks as arrays by tree path, and what export needs.

    DST/checkpoint.json                what it is
    DST/NETWORK/arrays/PATH/           one stored array per leaf
    DST/NETWORK/carried.safetensors    tensors that the network does not compute with
    DST/files/                         tokenizer, scheduler and the like, as they were
"""

import dataclasses
import functools
import hashlib
import json
import math
from typing import Any

from etils import epath

from twinflow_jax import files, models
from twinflow_jax.checkpoints import store, tensors
from twinflow_jax.errors import UserError
from twinflow_jax.models import conditioning, names
from twinflow_jax.models.family import Network, TextToImage
from twinflow_jax.models.settings import Settings

RECORD = "checkpoint.json"
# In config.json: names that other readers pass over.
TIMES, LATENTS = "_twinflow_time_conditioning", "_twinflow_latents"
FORMAT = 2  # 1 had the channels of Qwen-Image's queries and keys in another order


def array_folder(folder: epath.Path, network: str, path: str) -> epath.Path:
    return folder / network / "arrays" / path.replace("/", ".")


def carried_file(folder: epath.Path, network: str) -> epath.Path:
    return folder / network / "carried.safetensors"


@functools.cache
def layout(network: Network, config) -> tuple[names.NameTable, dict[str, Any]]:
    """A network's name table, and its abstract leaves by path.

    Kept, since tracing a network takes up to a second.
    """
    return network.table(config), names.flatten(network.abstract(config)[0])


def config_of(network: Network, published: dict[str, Any]):
    """Ours of a network's config.json, which in an export says how it sees its target time, and
    the height and width of the latents that an editor was trained with.

    Raises:
      UserError: it is of another network, or a time conditioning or latents that are not known.
    """
    config = network.config.from_published(published)
    if (sides := published.get(LATENTS)) is not None:
        if not (isinstance(sides, list) and [type(side) for side in sides] == [int, int]):
            raise UserError(f"{LATENTS} is {sides!r}, not [height, width]")
        shape = *sides, config.sample_shape[-1]
        config = dataclasses.replace(config, sample_shape=shape)
    told = published.get(TIMES)
    if told is None or not hasattr(config, "time_conditioning"):
        return config
    if told not in list(conditioning.TIMES):
        raise UserError(f"{TIMES} is {told!r}; known are {', '.join(conditioning.TIMES)}")
    return dataclasses.replace(config, time_conditioning=told)


@dataclasses.dataclass(frozen=True)
class Imported:
    """A complete imported checkpoint."""

    folder: epath.Path
    record: dict[str, Any]

    @property
    def family(self) -> str:
        return self.record["family"]

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that it holds."""
        return tuple(self.record["networks"])

    @property
    def text_to_image(self) -> TextToImage:
        """What its family offers, without the networks that it does without."""
        family = models.FAMILIES[self.family].text_to_image
        held = self.record.get("networks", family.networks)
        absent = [name for name, n in family.networks.items() if n.optional and name not in held]
        return family.without(absent)

    @property
    def text_identity(self) -> str:
        """The identity of all text encoders."""
        return " + ".join(map(self.identity, self.text_to_image.encoders))

    @functools.cached_property
    def text_width(self) -> int:
        """Of the tokens that the text encoders make."""
        encoders = self.text_to_image.encoders
        return self.text_to_image.text_width({name: self.config(name) for name in encoders})

    def tokenizer(self, encoder: str) -> epath.Path:
        """The folder of its files: one of its own, or beside those of the only network."""
        kept = self.folder / "files"
        own = kept / self.text_to_image.encoders[encoder].tokenizer
        return own if own.exists() else kept

    def network(self, name: str) -> Network:
        """Raises UserError where the checkpoint should hold that network, and does not."""
        network = self.text_to_image.networks[name]
        if network.published:
            self.recorded(name)
        return network

    def recorded(self, name: str) -> dict[str, Any]:
        """What the record says of a network.

        Raises:
          UserError: the checkpoint does not hold it.
        """
        if name not in self.parts:
            published = self.text_to_image.networks[name].published
            cure = "import the whole pipeline folder" if published else (
                f"{self.family} has none to import, train one and give the run"
            )
            raise UserError(f"{self.folder} holds only {', '.join(self.parts)}, no {name}: {cure}")
        return self.record["networks"][name]

    def config(self, name: str):
        """Our config of a network: read anew from the published one, where there is one, with the
        settings that training gave it."""
        network = self.network(name)
        if not network.published:
            return network.config()
        recorded = self.recorded(name)
        config = config_of(network, recorded["published"])
        config = network.found(config, recorded["added"])
        settings = recorded.get("settings", {}).items()
        lists = {key: tuple(value) if isinstance(value, list) else value for key, value in settings}
        return dataclasses.replace(config, **lists)

    @property
    def knows_r(self) -> bool:
        """Whether its transformer was trained with a target time, which base models are not.

        Raises:
          UserError: there is no transformer.
        """
        added = set(self.recorded("transformer")["added"])
        table = self.network("transformer").table(self.config("transformer"))
        return added.isdisjoint(table.group(names.KNOWS_R))

    @property
    def sized(self) -> bool:
        """Whether it says the latents that its transformer, an editor, was trained with."""
        own = self.recorded("transformer")
        return LATENTS in own["published"] or "sample_shape" in own.get("settings", {})

    def knowing_r(self, model: Settings) -> "Imported":
        """The same checkpoint, its transformer trained with a target time, seen as model's; of an
        editor, in the size of its samples."""
        settings = {"time_conditioning": model.time_conditioning}
        if self.text_to_image.editing:
            settings["sample_shape"] = model.sample_shape
        own = self.recorded("transformer") | {"added": [], "settings": settings}
        networks = self.record["networks"] | {"transformer": own}
        return dataclasses.replace(self, record=self.record | {"networks": networks})

    @functools.cached_property
    def scheduler(self) -> dict[str, Any]:
        """The published scheduler_config.json, {} where there is none.

        Raises:
          UserError: it cannot be read.
        """
        return self._kept("scheduler/scheduler_config.json")

    @functools.cached_property
    def processor(self) -> dict[str, Any]:
        """The published preprocessor_config.json: how pictures are looked at; {} without one.

        Raises:
          UserError: it cannot be read.
        """
        name = "preprocessor_config.json"
        return self._kept(f"processor/{name}") or self._kept(f"tokenizer/{name}")

    def _kept(self, name: str) -> dict[str, Any]:
        """A kept JSON file, {} where there is none."""
        file = self.folder / "files" / name
        if not file.exists():
            return {}
        try:
            return dict(json.loads(file.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} cannot be read ({error}): import again") from error

    @property
    def is_distilled(self) -> bool:
        """Whether its velocities are guided already."""
        marks = self.text_to_image.distilled
        return bool(marks) and marks.items() <= self.scheduler.items()

    @property
    def base_sampling(self) -> tuple[int, float]:
        """Steps and guidance of the base model's own sampling."""
        family = self.text_to_image
        if self.is_distilled:
            return family.distilled_steps, family.no_guidance
        return family.base_steps, family.base_guidance

    def arrays(self, name: str) -> store.Arrays:
        """The arrays of a network by path, open and not yet read.

        Raises:
          UserError: the checkpoint does not hold them, or one cannot be read.
        """
        table, leaves = layout(self.network(name), self.config(name))
        if leaves:
            self.recorded(name)
        return {
            rule.path: store.open_array(
                store.location(array_folder(self.folder, name, rule.path))
            )
            for rule in table.rules
        }

    def identity(self, name: str) -> str:
        """A network and its weights as people name them, such as "Gemma2Model 2.6B 1f3a9c".

        The last part is a digest of the published config and of a sample of the weights, the same
        whichever dtype they were imported in. "" for a network without weights.
        Raises:
          UserError: the checkpoint does not hold it.
        """
        leaves = layout(self.network(name), self.config(name))[1]
        if not leaves:
            return ""
        published = self.recorded(name)["published"]
        kind = published.get("_class_name") or published["architectures"][0]
        told = {key: value for key, value in published.items() if not key.startswith("_")}
        for key in ("transformers_version", "torch_dtype", "dtype"):  # of the file, not the network
            told.pop(key, None)
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        digest.update(store.sampled(self.arrays(name)))
        size = sum(math.prod(leaf.shape) for leaf in leaves.values())
        unit, letter = next(u for u in ((10**9, "B"), (10**6, "M"), (10**3, "K")) if size >= u[0])
        return f"{kind} {size / unit:.3g}{letter} {digest.hexdigest()[:6]}"

    def carried(self, name: str) -> dict[str, tensors.Tensor]:
        """The tensors that are only kept for export, by published key."""
        if not self.record["networks"][name]["carried"]:
            return {}
        return tensors.read_header(carried_file(self.folder, name))


def is_imported(folder: epath.PathLike) -> bool:
    folder = epath.Path(folder)
    return (folder / RECORD).exists() or (folder / files.UNFINISHED).exists()


def open_imported(folder: epath.PathLike) -> Imported:
    """The checkpoint in a folder.

    Raises:
      UserError: there is none, its import did not finish, or its record cannot be read.
    """
    folder = epath.Path(folder)
    if (folder / files.UNFINISHED).exists():
        raise UserError(f"{folder} was not imported to its end: run the import again")
    if not (folder / RECORD).exists():
        raise UserError(f"{folder} is no imported checkpoint: it has no {RECORD}")
    try:
        record = json.loads((folder / RECORD).read_text())
        known = record["format"] == FORMAT and record["family"] in models.FAMILIES
        networks = models.FAMILIES[record["family"]].text_to_image.networks if known else {}
        known = known and record["networks"].keys() <= networks.keys()
        known = known and all(files.is_plain(name) for name in record["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / RECORD} cannot be read ({error!r}): import again") from error
    if not known:
        raise UserError(f"{folder / RECORD} is of another version of this project: import again")
    return Imported(folder, record)

"""Training records on disk: encoded pictures and captions as a TFDS dataset of ArrayRecord files.

    FOLDER/records.json                     what they were made with
    FOLDER/null.safetensors                 the embedding of the prompt that stands for none
    FOLDER/features.json, dataset_info.json   TFDS's: `tfds.builder_from_directory(FOLDER)` reads it
    FOLDER/records-SPLIT.array_record-00000-of-00002

A split holds pictures of one size ("768x512": width x height in pixels), edits of one size with
sources of others ("768x512_768x512": the result, then each source), or prompts alone ("prompts").
The features of a record:

    id        where it came from
    captions  one or several
    lengths   tokens of each caption
    tokens    (their sum, width), float16: the captions' embeddings, valid tokens only
    latents   (h, w, c), float16: normalised, the mean of the autoencoder's distribution
    image     in place of latents, for networks that draw pixels: a PNG
    noise     of the same shape, float16, where it was kept: what the sample was drawn from
    width, height   of the picture as it was found

and of an edit, whose captions are instructions:

    shown       (tokens, width), float16: of the pictures, which stand before those of each caption
    null        (tokens, width), float16: those after them of the instruction that stands for none
    references  (places, c), float16: the sources' latents, one source after the other
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Float, Int
from PIL import Image
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from twinflow_jax import buckets, cache, files
from twinflow_jax.data import features
from twinflow_jax.errors import UserError, reason

RECORD, NULL = "records.json", "null.safetensors"
NAME, VERSION, FORMAT = "records", "1.0.0", 1
PROMPTS = "prompts"  # the split of records without pictures


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What records were made with; two folders with equal ones can be mixed.

    family: of models. text_encoder, autoencoder: which weights, as they are named to people;
    autoencoder is "" for pixels. channels: of a sample, 0 for prompts alone. text_width: of a
    token. downscale: pixels a side for one place of a sample. edits: whether captions are about
    other pictures. pairs: whether samples were drawn from noise that stands beside them.
    """

    family: str
    text_encoder: str
    text_width: int
    autoencoder: str
    channels: int
    downscale: int
    edits: bool = False
    pairs: bool = False

    def told(self) -> dict[str, Any]:
        """The fields, as they were before there were edits and pairs where these are none."""
        later = ("edits", "pairs")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in later or v}

    def features(self) -> tfds.features.FeaturesDict:
        """The documented features of a record."""
        kinds = tfds.features
        half = lambda *shape: kinds.Tensor(shape=shape, dtype=np.float16, encoding="bytes")
        fields = {
            "id": kinds.Text(),
            "captions": kinds.Sequence(kinds.Text()),
            "lengths": kinds.Tensor(shape=(None,), dtype=np.int32),
            "tokens": half(None, self.text_width),
        }
        if self.channels:
            fields |= {"width": kinds.Scalar(np.int32), "height": kinds.Scalar(np.int32)}
        if self.autoencoder:
            fields["latents"] = half(None, None, self.channels)
        elif self.channels:
            fields["image"] = kinds.Image(
                shape=(None, None, self.channels), encoding_format="png"
            )
        if self.pairs:
            fields["noise"] = half(None, None, self.channels)
        if self.edits:
            fields |= {name: half(None, self.text_width) for name in ("shown", "null")}
            fields["references"] = half(None, self.channels)
        return kinds.FeaturesDict(fields)


@dataclasses.dataclass(frozen=True)
class Edit:
    """What an edit has besides. shown: the tokens of its pictures, which stand before each
    caption's and before `null`, those of the instruction that stands for none. references: the
    latents of its pictures."""

    shown: Float[np.ndarray, "_ D"]
    null: Float[np.ndarray, "_ D"]
    references: tuple[Float[np.ndarray, "_ _ c"], ...]


@dataclasses.dataclass(frozen=True)
class Example:
    """One record. tokens: each caption's. sample: latents, or pixels in [-1, 1]; None where
    there are prompts alone. size: (width, height) of the picture as it was found. edit: of records
    of edits. noise: of pairs."""

    id: str
    captions: Sequence[str]
    tokens: Sequence[Float[np.ndarray, "_ D"]]
    sample: Float[np.ndarray, "h w c"] | None = None
    size: tuple[int, int] = (0, 0)
    edit: Edit | None = None
    noise: Float[np.ndarray, "h w c"] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest of its texts, with those of the pictures that it is about."""
        if self.edit is None:
            return max(map(len, self.tokens))
        return len(self.edit.shown) + max(map(len, (self.edit.null, *self.tokens)))


def shard_file(folder: epath.PathLike, split: str, number: int, shards: int) -> epath.Path:
    return epath.Path(folder) / f"{NAME}-{split}.array_record-{number:05d}-of-{shards:05d}"


def write_shard(path: epath.PathLike, examples: Iterable[Example], manifest: Manifest) -> int:
    """Writes a file of records, which appears whole or not at all; returns its bytes.

    Raises:
      UserError: a number that float16 does not hold, or no room on the disk.
    """
    path, written = epath.Path(path), manifest.features()
    serializer = ExampleSerializer(written.get_serialized_info())
    # ArrayRecord writes local files only. Hidden: TFDS and a listing pass over it.
    folder = epath.Path(tempfile.gettempdir()) if buckets.is_remote(path) else path.parent
    temporary = folder / f".{path.name}.{os.getpid()}"
    try:
        # Any record is read alone, and float16 and PNG hardly get smaller.
        with _room_for(path):
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for example in examples:  # what fails in making these is not the disk's fault
            fields = written.encode_example(_fields(example, manifest))
            with _room_for(path):
                writer.write(serializer.serialize_example(fields))
        with _room_for(path):
            writer.close()
        size = temporary.stat().length
        if folder == path.parent:
            temporary.replace(path)
        else:
            temporary.copy(path, overwrite=True)
    finally:
        temporary.unlink(missing_ok=True)
    return size


@contextlib.contextmanager
def _room_for(path: epath.Path):
    """Around what ArrayRecord writes."""
    try:
        yield
    except RuntimeError as error:
        advice = "make room for it, and give" if files.is_full(error) else "give"
        raise UserError(
            f"{path.name} cannot be written ({error}): {advice} the same command again"
        ) from error


def _fields(example: Example, manifest: Manifest) -> dict[str, Any]:
    fields = {
        "id": example.id,
        "captions": list(example.captions),
        "lengths": np.array([len(tokens) for tokens in example.tokens], np.int32),
        "tokens": _half(np.concatenate(example.tokens), example.id),
    }
    if manifest.channels:
        fields["width"], fields["height"] = example.size
    if manifest.autoencoder:
        fields["latents"] = _half(example.sample, example.id)
    elif manifest.channels:
        pixels = np.round((np.asarray(example.sample, np.float32) + 1) * 127.5).astype(np.uint8)
        fields["image"] = io.BytesIO()
        Image.fromarray(pixels).save(fields["image"], "PNG")
        fields["image"].seek(0)
    if manifest.pairs:
        fields["noise"] = _half(example.noise, example.id)
    if example.edit is not None:
        places = [one.reshape(-1, one.shape[-1]) for one in example.edit.references]
        beside = {**vars(example.edit), "references": np.concatenate(places)}
        fields |= {name: _half(array, example.id) for name, array in beside.items()}
    return fields


def _half(array: np.ndarray, of: str) -> np.ndarray:
    """As float16, which keeps all that bfloat16 computes except beyond 65504."""
    with np.errstate(over="ignore"):
        half = np.asarray(array, np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"record {of}: the networks gave numbers beyond float16, or none at all")
    return half


def finish(
    folder: epath.PathLike, manifest: Manifest,
    shards: Mapping[str, Sequence[tuple[int, int]]], report: Mapping[str, Any],
) -> None:
    """Makes a folder of written files a dataset. shards: of each split its files' (records,
    bytes). report: what else to keep in records.json, which is written last."""
    folder = epath.Path(folder)
    splits = [
        tfds.core.SplitInfo(
            name=split, shard_lengths=[records for records, _ in parts],
            num_bytes=sum(size for _, size in parts),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder, dataset_name=NAME, split=split, filetype_suffix="array_record",
            ),
        )
        for split, parts in shards.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=manifest.features(), split_infos=splits, version=VERSION,
        description="Encoded pictures and captions of twinflow_jax.", check_data=False,
    )
    record = {"format": FORMAT, "manifest": manifest.told(), **report}
    files.write(folder / RECORD, json.dumps(record, indent=1).encode())


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """A finished folder of records."""

    folder: epath.Path
    manifest: Manifest
    report: dict[str, Any]

    def _here(self) -> epath.Path:
        """The folder, or this machine's copy of one in a bucket: ArrayRecord reads local files."""
        if not buckets.is_remote(self.folder):
            return self.folder
        told = f"{self.folder} {(self.folder / RECORD).read_text()}"
        here = files.cache() / f"records-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        missing = [file for file in self.folder.iterdir() if not (here / file.name).exists()]
        size = sum(file.stat().length for file in missing)
        files.check_room(here, size)
        if missing:
            print(f"copying {self.folder}, {size / 1e9:.2f} GB, to {here}", file=sys.stderr)
        for file in missing:
            with files.whole_file(here / file.name) as temporary:
                file.copy(temporary)
        return here

    @functools.cached_property
    def _builder(self):
        features.check(self.folder)
        here = self._here()
        try:
            builder = tfds.builder_from_directory(here)
        except Exception as error:  # TFDS raises many kinds
            raise UserError(
                f"{self.folder} cannot be read as a TFDS dataset ({reason(error)}): copy it again "
                "as it was written, or encode again"
            ) from error
        there = {entry.name for entry in here.iterdir()}
        files_ = (file.name for info in builder.info.splits.values() for file in info.filepaths)
        missing = [name for name in files_ if name not in there]
        if missing:
            raise UserError(
                f"{self.folder} lacks {len(missing)} of its files, as {missing[0]}: copy it again "
                "as it was written, or encode again"
            )
        return builder

    @functools.cached_property
    def splits(self) -> dict[str, int]:
        """Records of each split that has any."""
        found = {name: info.num_examples for name, info in self._builder.info.splits.items()}
        return {name: count for name, count in sorted(found.items()) if count}

    def __len__(self) -> int:
        """Records of all splits."""
        return sum(self.splits.values())

    def sample_shape(self, split: str) -> tuple[int, int, int]:
        """(h, w, c) of a split's samples."""
        return self._shapes(split)[0]

    def reference_shapes(self, split: str) -> tuple[tuple[int, int, int], ...]:
        """(h, w, c) of each source of a split's edits."""
        return self._shapes(split)[1:]

    def _shapes(self, split: str) -> tuple[tuple[int, int, int], ...]:
        sizes = (map(int, size.split("x")) for size in split.split("_"))
        scale, channels = self.manifest.downscale, self.manifest.channels
        return tuple((height // scale, width // scale, channels) for width, height in sizes)

    @functools.cache  # noqa: B019 - few folders, for as long as a run
    def source(self, split: str) -> Sequence[dict[str, Any]]:
        """The features of each record of a split, in any order."""
        return self._builder.as_data_source(split)

    def read(self, split: str, index: int) -> Example:
        """One record.

        Raises:
          UserError: its file is damaged or gone.
        """
        try:
            fields = self.source(split)[index]
        except Exception as error:  # ArrayRecord, TFDS and Pillow raise many kinds
            raise UserError(
                f"record {index} of {split} in {self.folder} cannot be read ({reason(error)}): "
                "copy the folder again as it was written, or encode again"
            ) from error
        ends = np.cumsum(fields["lengths"])[:-1]
        sample = fields.get("latents")
        if "image" in fields:
            sample = fields["image"].astype(np.float32) / 127.5 - 1
        return Example(
            fields["id"].decode(), tuple(caption.decode() for caption in fields["captions"]),
            np.split(fields["tokens"], ends), sample,
            (int(fields.get("width", 0)), int(fields.get("height", 0))),
            self._edit(split, fields) if self.manifest.edits else None, fields.get("noise"),
        )

    @functools.cache  # noqa: B019 - as above
    def longest(self, split: str) -> Int[np.ndarray, "N"]:
        """`Example.longest` of each record of a split. All are read for it, once: it is kept."""
        told = [(self.folder / name).read_bytes() for name in (RECORD, "dataset_info.json")]
        key = [f"{self.folder} {split}".encode(), *told]

        def read() -> dict[str, np.ndarray]:
            rows = tqdm(
                range(self.splits[split]), unit="record", desc="lengths of captions", disable=None
            )
            return {"longest": np.array([self.read(split, row).longest for row in rows], np.int32)}

        return cache.kept("caption_lengths", key, read)["longest"]

    def _edit(self, split: str, fields: dict[str, Any]) -> Edit:
        """Raises UserError where the sources have other shapes than the split's."""
        shapes, places = self.reference_shapes(split), fields["references"]
        ends = np.cumsum([height * width for height, width, _ in shapes])
        if ends[-1] != len(places):
            raise UserError(
                f"record {fields['id'].decode()} of {split} in {self.folder} has {len(places)} "
                f"latents of sources, not {ends[-1]}: one batch holds one shape; encode again"
            )
        parts = zip(np.split(places, ends[:-1]), shapes, strict=True)
        references = tuple(part.reshape(shape) for part, shape in parts)
        return Edit(fields["shown"], fields["null"], references)


def open_records(folder: epath.PathLike) -> Records:
    """The records in a folder.

    Raises:
      UserError: there are none, they are not complete, or they cannot be read.
    """
    folder = epath.Path(folder)
    if not (folder / RECORD).exists():
        raise UserError(
            f"{folder} holds no complete records: give what twinflow encode wrote, and run it "
            "again where it did not come to its end"
        )
    try:
        record = json.loads((folder / RECORD).read_text())
        known = record.pop("format") == FORMAT
        manifest = Manifest(**record.pop("manifest")) if known else None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{folder / RECORD} cannot be read ({error!r}): encode again") from error
    if manifest is None:
        raise UserError(f"{folder / RECORD} is of another version of this project: encode again")
    return Records(folder, manifest, record)

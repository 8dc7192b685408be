"""Sources that keep many pictures in a file: Parquet, WebDataset tars and TFDS datasets."""

import dataclasses
import errno
import functools
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from etils import epath

from twinflow_jax.data import features
from twinflow_jax.data.tables import opened
from twinflow_jax.encoding.beside import is_hidden, paired
from twinflow_jax.encoding.sources import (
    CAPTIONS,
    IMAGES,
    UNREADABLE,
    Item,
    clean,
    digest,
    keys_of,
    labelled,
)
from twinflow_jax.errors import UserError, reason

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COLUMNS = ("image_bytes", "image")  # usual names of Parquet's, the reference's first


def stamp(files: Sequence[epath.Path]) -> str:
    """A fingerprint of files by name and size."""
    return digest(*(f"{file.name}\n{file.stat().length}" for file in files))


class Parquet:
    """Parquet files with a column of captions and one of encoded pictures.

    A picture is bytes, or a struct with them under "bytes", as Hugging Face's datasets write it.
    A row group is read at a time.
    """

    def __init__(
        self, files: Sequence[epath.Path], name: str, pictures: bool,
        image: str | None, caption: str | None,
    ):
        self.files, self.name, self.pictures = list(files), name, pictures
        self._caption = caption
        self.chunks, self._columns = [], []
        for number, file in enumerate(self.files):
            with opened(file) as table:
                found = table.schema_arrow.names
                columns = [keys_of(found, caption, CAPTIONS, "--caption-column", file)]
                if pictures:
                    columns.append(keys_of(found, image, COLUMNS, "--image-column", file))
                self._columns.append(columns)
                self.chunks += [(number, group) for group in range(table.num_row_groups)]
        self._lock = threading.Lock()  # threads wait for a row group instead of reading it again

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one source, for as long as a process
    def _rows(self, number: int, group: int, part: int) -> list[dict[str, Any]]:
        """A row group's columns of captions (part 0) or of pictures (1)."""
        file = self.files[number]
        with opened(file) as table:
            try:
                return table.read_row_group(group, self._columns[number][part]).to_pylist()
            except (pyarrow.ArrowException, OSError) as error:  # a number: one that may pass
                kind = getattr(error, "errno", None) or 0
                raise OSError(kind, f"row group {group} of {file.name}: {error}") from error

    def items(self, chunk) -> Iterator[Item]:
        number, group = chunk
        stem = f"{self.files[number].name}:{group}:"
        try:
            captions = self._rows(number, group, 0)
        except OSError as error:
            if error.errno:
                raise
            yield Item(f"{stem}*", problem=(UNREADABLE, error.strerror))
            return
        for row, values in enumerate(captions):
            yield self._item(f"{stem}{row}", [number, group, row], values)

    def _item(self, name: str, place: list, captions: dict[str, Any]) -> Item:
        value = captions if self._caption is None else captions[self._caption]
        return labelled(name, value, place if self.pictures else None)

    def read(self, place) -> bytes:
        number, group, row = place
        with self._lock:
            values = self._rows(number, group, 1)[row]
        for value in values.values():
            value = value.get("bytes") if isinstance(value, dict) else value
            if isinstance(value, bytes):
                return value
        raise OSError(0, f"column {' or '.join(map(repr, values))} holds no bytes")

    def fingerprint(self) -> str:
        return stamp(self.files) + digest(
            *(" ".join(sum(columns, [])) for columns in self._columns)
        )


class Tars:
    """WebDataset tars, in which `paired` tells what belongs together.

    Nothing is extracted: pictures are read where they lie in the archive.
    """

    def __init__(self, files: Sequence[epath.Path], name: str, pictures: bool):
        self.files, self.name, self.pictures = list(files), name, pictures
        self.chunks = list(range(len(self.files)))

    def items(self, chunk: int) -> Iterator[Item]:
        file, members, problems = self.files[chunk], {}, {}
        if not file.name.lower().endswith(".tar"):
            yield Item(f"{file.name}/*", problem=(UNREADABLE, "it is compressed: unpack it first"))
            return
        with file.open("rb") as handle:
            try:
                for member in tarfile.TarFile(fileobj=handle):
                    name = member.name.lstrip("/")
                    if member.isdir() or is_hidden(name):
                        continue
                    if name in members:
                        again = f"{clean(name)}@{member.offset_data}"
                        problems[again] = "a file of this name came before"
                    members.setdefault(name, member)
            except (tarfile.TarError, OSError, ValueError) as error:
                if getattr(error, "errno", None) not in (None, errno.EINVAL):  # it may pass
                    raise
                problems["*"] = f"the archive is damaged after {len(members)} files: {error}"
            end = file.stat().length

            def within(name: str) -> tuple[int, int]:
                """Where a member's bytes are; ValueError where it has none."""
                begin, size = members[name].offset_data, members[name].size
                if not members[name].isreg():
                    raise ValueError("it is a link")
                if size < 0 or begin + size > end:
                    raise ValueError("the archive ends before it does")
                return begin, size

            def read(name: str) -> bytes:
                begin, size = within(name)
                handle.seek(begin)
                return handle.read(size)

            for row in paired(members):
                row = dataclasses.replace(row, name=f"{file.name}/{row.name}")
                try:
                    place = [chunk, *within(row.picture)] if row.picture else None
                except ValueError as error:
                    yield Item(clean(row.name), problem=(UNREADABLE, str(error)))
                    continue
                yield row.item(place, self.pictures, read)
        for name, problem in problems.items():
            yield Item(f"{file.name}/{name}", problem=(UNREADABLE, problem))

    def read(self, place) -> bytes:
        number, offset, size = place
        with self.files[number].open("rb") as handle:
            handle.seek(offset)
            return handle.read(size)

    def fingerprint(self) -> str:
        return stamp(self.files)


class Tfds:
    """A split of a TFDS dataset: a prepared folder of ArrayRecord files, or a known name."""

    def __init__(
        self, name: str, split: str, pictures: bool, chunk: int,
        image: str | None, caption: str | None,
    ):
        import tensorflow_datasets as tfds  # takes seconds to import

        self.pictures = pictures
        if epath.Path(name).is_dir():
            features.check(name)
        try:
            if epath.Path(name).is_dir():
                builder = tfds.builder_from_directory(name)
            else:
                builder = tfds.builder(name, file_format="array_record")
                builder.download_and_prepare()
        except Exception as error:  # TFDS raises many kinds where a download fails
            said = (str(error).splitlines() or [type(error).__name__])[0]  # a catalogue follows
            raise UserError(
                f"{name} cannot be read as a TFDS dataset ({said}): give a path that exists, or "
                "a name of TFDS's catalogue"
            ) from error
        splits = list(builder.info.splits)
        if not split and len(splits) > 1:
            raise UserError(f"{name} has the splits {', '.join(splits)}: add one, as {name}:SPLIT")
        self.split = split or splits[0]
        if re.split(r"[\[+]", self.split)[0] not in splits:
            raise UserError(f"{name} has no split {self.split!r}; it has {', '.join(splits)}")
        self.name = f"{builder.info.name}:{self.split}"
        found, where = builder.info.features, f"the dataset {name}"
        self._captions = keys_of(list(found), caption, CAPTIONS, "--caption-column", where)
        self._given, decoders = caption, {}
        labels = [k for k in self._captions if isinstance(found[k], tfds.features.ClassLabel)]
        self._names = {key: found[key].names for key in labels}
        if pictures:
            self._image = keys_of(list(found), image, IMAGES, "--image-column", where)[0]
            if not isinstance(found[self._image], tfds.features.Image):
                raise UserError(f"{where} has no pictures in {self._image!r}: give --image-column")
            decoders = {self._image: tfds.decode.SkipDecoding()}  # the file, as it was
        self._rows = builder.as_data_source(self.split, decoders=decoders)
        self._version = str(builder.info.version)
        starts = range(0, len(self._rows), chunk)
        self.chunks = [(start, min(start + chunk, len(self._rows))) for start in starts]

    def items(self, chunk) -> Iterator[Item]:
        for row in range(*chunk):
            try:
                found = self._row(row)
            except OSError as error:
                yield Item(f"{self.name}:{row}", problem=(UNREADABLE, error.strerror))
                continue
            values = {key: self._text(key, found[key]) for key in self._captions}
            value = values if self._given is None else values[self._given]
            yield labelled(f"{self.name}:{row}", value, row if self.pictures else None)

    def _text(self, key: str, value: Any) -> Any:
        """A value as `captions_of` takes it; of a class its name."""
        value = self._names[key][int(value)] if key in self._names else value
        return value.tolist() if isinstance(value, np.ndarray) else value

    def read(self, place: int) -> bytes:
        return self._row(place)[self._image]

    def _row(self, row: int) -> dict:
        try:
            return self._rows[row]
        except Exception as error:  # ArrayRecord and TFDS raise many kinds
            raise OSError(0, f"{type(error).__name__}: {reason(error)}") from error

    def fingerprint(self) -> str:
        return digest(self.name, self._version, str(len(self._rows)), " ".join(self._captions))

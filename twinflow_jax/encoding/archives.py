"""Sources that keep many pictures in a file: Parquet, WebDataset tars and TFDS datasets."""

import errno
import functools
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow
import pyarrow.parquet
from etils import epath

from twinflow_jax.data import features
from twinflow_jax.encoding.sources import (
    CAPTIONS,
    IMAGES,
    NO_CAPTION,
    READERS,
    SUFFIXES,
    UNREADABLE,
    Item,
    captions_of,
    clean,
    digest,
    item,
)
from twinflow_jax.errors import UserError, reason

COLUMNS = ("image_bytes", "image")  # usual names of Parquet's, the reference's first


def key_of(found: Sequence[str], given: str | None, usual: Sequence[str], flag: str, where) -> str:
    """The column, or feature, to use: the one that was given, or the first usual one.

    Raises:
      UserError: there is none.
    """
    wanted = usual if given is None else (given,)
    key = next((key for key in wanted if key in found), None)
    if key is None:
        raise UserError(
            f"{where} has no {' or '.join(map(repr, wanted))}; it has {', '.join(found)}: "
            f"give one with {flag}"
        )
    return key


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
        self.chunks, self._columns = [], []
        for number, file in enumerate(self.files):
            with opened(file) as table:
                found = table.schema_arrow.names
                columns = [key_of(found, caption, CAPTIONS, "--caption-column", file)]
                if pictures:
                    columns.append(key_of(found, image, COLUMNS, "--image-column", file))
                self._columns.append(columns)
                self.chunks += [(number, group) for group in range(table.num_row_groups)]
        self._lock = threading.Lock()  # threads wait for a row group instead of reading it again

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one source, for as long as a process
    def _column(self, number: int, group: int, column: str) -> list:
        file = self.files[number]
        with opened(file) as table:
            try:
                return table.read_row_group(group, [column]).column(0).to_pylist()
            except (pyarrow.ArrowException, OSError) as error:  # a number: one that may pass
                kind = getattr(error, "errno", None) or 0
                raise OSError(kind, f"row group {group} of {file.name}: {error}") from error

    def items(self, chunk) -> Iterator[Item]:
        number, group = chunk
        stem = f"{self.files[number].name}:{group}:"
        try:
            captions = self._column(number, group, self._columns[number][0])
        except OSError as error:
            if error.errno:
                raise
            yield Item(f"{stem}*", problem=(UNREADABLE, error.strerror))
            return
        for row, value in enumerate(captions):
            place = [number, group, row] if self.pictures else None
            yield Item(f"{stem}{row}", captions_of(value), place)

    def read(self, place) -> bytes:
        number, group, row = place
        with self._lock:
            value = self._column(number, group, self._columns[number][1])[row]
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise OSError(0, f"column {self._columns[number][1]!r} holds no bytes")
        return value

    def fingerprint(self) -> str:
        return stamp(self.files) + digest(*(" ".join(columns) for columns in self._columns))


def opened(file: epath.Path) -> pyarrow.parquet.ParquetFile:
    """Raises UserError where it is no Parquet file."""
    try:
        return pyarrow.parquet.ParquetFile(file.open("rb"))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file} cannot be read ({reason(error)}): is it a whole Parquet file?"
        ) from error


class Tars:
    """WebDataset tars: members of one name before the first dot are a picture and its captions.

    Nothing is extracted: pictures are read where they lie in the archive.
    """

    def __init__(self, files: Sequence[epath.Path], name: str, pictures: bool):
        self.files, self.name, self.pictures = list(files), name, pictures
        self.chunks = list(range(len(self.files)))

    def items(self, chunk: int) -> Iterator[Item]:
        file, groups, problem = self.files[chunk], {}, ""
        with file.open("rb") as handle:
            try:
                for member in tarfile.TarFile(fileobj=handle):
                    folder, _, base = member.name.rpartition("/")
                    stem, dot, suffix = base.partition(".")
                    if not member.isreg() or base.startswith("."):
                        continue
                    kind = dot + suffix.rpartition(".")[2].lower()
                    group = groups.setdefault(f"{folder}/{stem}".lstrip("/"), {})
                    group.setdefault(kind, (member.offset_data, member.size))
            except (tarfile.TarError, OSError, ValueError) as error:
                if getattr(error, "errno", None) not in (None, errno.EINVAL):  # it may pass
                    raise
                problem = f"the archive is damaged after {len(groups)} items: {error}"
            end = file.stat().length
            for name, members in groups.items():
                yield self._item(chunk, handle, f"{file.name}/{clean(name)}", members, end)
        if problem:
            yield Item(f"{file.name}/*", problem=(UNREADABLE, problem))

    def _item(self, chunk: int, handle, name: str, members: dict, end: int) -> Item:
        picture = next((members[suffix] for suffix in members if suffix in SUFFIXES), None)
        text = next((suffix for suffix in READERS if suffix in members), None)
        used = [part for part in (picture, members.get(text)) if part]
        if any(size < 0 or offset + size > end for offset, size in used):
            return Item(name, problem=(UNREADABLE, "the archive ends before it does"))
        if text is None:
            return Item(name, problem=(NO_CAPTION, f"it has only {' '.join(members)}"))
        if self.pictures and picture is None:
            return Item(name, problem=(UNREADABLE, f"no picture: it has only {' '.join(members)}"))
        offset, size = members[text]
        handle.seek(offset)
        place = [chunk, *picture] if self.pictures else None
        return item(name, place, handle.read(size), text)

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
        self._caption = key_of(list(found), caption, CAPTIONS, "--caption-column", where)
        label, decoders = found[self._caption], {}
        self._names = label.names if isinstance(label, tfds.features.ClassLabel) else None
        if pictures:
            self._image = key_of(list(found), image, IMAGES, "--image-column", where)
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
                value = self._row(row)[self._caption]
            except OSError as error:
                yield Item(f"{self.name}:{row}", problem=(UNREADABLE, error.strerror))
                continue
            value = value if self._names is None else self._names[int(value)]
            value = value.tolist() if isinstance(value, np.ndarray) else value
            yield Item(f"{self.name}:{row}", captions_of(value), row if self.pictures else None)

    def read(self, place: int) -> bytes:
        return self._row(place)[self._image]

    def _row(self, row: int) -> dict:
        try:
            return self._rows[row]
        except Exception as error:  # ArrayRecord and TFDS raise many kinds
            raise OSError(0, f"{type(error).__name__}: {reason(error)}") from error

    def fingerprint(self) -> str:
        return digest(self.name, self._version, str(len(self._rows)), self._caption)

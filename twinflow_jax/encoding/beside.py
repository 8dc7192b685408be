"""Pictures in folders and tars, with captions in files beside them."""

import concurrent.futures
import dataclasses
import json
import pathlib
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from twinflow_jax import buckets, files
from twinflow_jax.encoding.sources import (
    LOST,
    NO_CAPTION,
    SUFFIXES,
    THREADS,
    UNREADABLE,
    Item,
    captions_of,
    clean,
    cut,
    digest,
    suffix_of,
)
from twinflow_jax.errors import UserError


def from_lines(data: bytes) -> tuple[str, ...]:
    """One caption a line. Raises UnicodeDecodeError."""
    return captions_of([line for _, line in files.text_lines(data)])


def from_json(data: bytes) -> tuple[str, ...]:
    """Raises ValueError where it is no JSON in UTF-8."""
    try:
        return captions_of(json.loads(data.decode("utf-8-sig")))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


READERS = {".txt": from_lines, ".caption": from_lines, ".json": from_json}


@dataclasses.dataclass(frozen=True)
class Beside:
    """Files that lie together. name: of the item. texts: that may have the picture's captions."""

    name: str
    picture: str | None
    texts: tuple[str, ...]

    def item(self, place: Any, pictures: bool, read: Callable[[str], bytes]) -> Item:
        """The item that they are, with the captions of the first file that has any.

        pictures: whether these are wanted. read: a file by its name.
        """
        name = clean(self.name)
        if pictures and self.picture is None:
            what = "captions of no picture, or of several" if self.texts else "of no known kind"
            return Item(name, problem=(UNREADABLE, what))
        for text in self.texts:
            try:
                captions = READERS[suffix_of(text)](read(text))
            except ValueError as error:  # also of UTF-8
                return Item(name, problem=(UNREADABLE, f"{clean(text)}: {error}"))
            if captions:
                return Item(name, captions, place if pictures else None)
        what = f"{clean(self.texts[0])} is empty" if self.texts else "no caption file of its name"
        return Item(name, problem=(NO_CAPTION, what))


def stem_of(name: str) -> str:
    return posixpath.splitext(name)[0]


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it is in, has a name that begins with a dot."""
    return any(part.strip(".") and part.startswith(".") for part in name.split("/"))


def paired(names: Iterable[str]) -> Iterator[Beside]:
    """Pictures with the files that may have their captions, from names of files.

    Those of CAT.jpg are in CAT.txt, CAT.caption or CAT.json, or in CAT.jpg.txt. As in WebDataset,
    CAT.left.jpg and CAT.words.txt belong together too, where CAT has no other picture and only one
    such file of a kind, and where neither is numbered, as CAT.0001.jpg is. Of files that nothing
    belongs to only those are passed over that lie beside a picture or captions of their name.
    """
    groups = {}  # by the name up to the first dot
    for name in names:
        folder, slash, base = name.rpartition("/")
        groups.setdefault(folder + slash + base.partition(".")[0], []).append(name)
    for group, members in groups.items():
        pictures = [name for name in members if suffix_of(name) in SUFFIXES]
        texts = [name for name in members if suffix_of(name) in READERS]
        texts.sort(key=lambda text: (list(READERS).index(suffix_of(text)), text))
        by_stem = {}
        for text in texts:
            by_stem.setdefault(stem_of(text), []).append(text)
        own = {name: [*by_stem.get(stem_of(name), ()), *by_stem.get(name, ())] for name in pictures}
        if len(pictures) == 1 and not own[pictures[0]]:
            plain = [
                name for name in (*pictures, *texts)
                if not any(letter.isdigit() for letter in stem_of(name)[len(group) :])
            ]
            if pictures[0] in plain and len(set(map(suffix_of, plain))) == len(plain):
                own[pictures[0]] = plain[1:]
        for picture, of_it in own.items():
            yield Beside(group if len(pictures) == 1 else picture, picture, tuple(of_it))
        claimed = {text for of_it in own.values() for text in of_it}
        yield from (Beside(text, None, (text,)) for text in texts if text not in claimed)
        if not pictures and not texts:
            yield from (Beside(name, None, ()) for name in members)


class Folder:
    """Pictures in a folder and the folders in it, each with captions beside it.

    names: of all its files, sorted.
    """

    def __init__(self, folder: epath.Path, names: Sequence[str], pictures: bool, chunk: int):
        self.folder, self.name, self.pictures = folder, folder.name, pictures
        self._rows = list(paired(names))
        if not any(row.picture or (row.texts and not pictures) for row in self._rows):
            raise UserError(
                f"{folder} holds no pictures ({' '.join(SUFFIXES)}): give a folder with pictures, "
                ".parquet or .tar files, or a prepared TFDS dataset"
            )
        self.chunks = cut(self._rows, chunk)

    def items(self, chunk) -> Iterator[Item]:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
            yield from threads.map(self._item, chunk)

    def _item(self, row: Beside) -> Item:
        row = dataclasses.replace(row, name=row.picture or row.name)
        try:
            return row.item(row.picture, self.pictures, self.read)
        except OSError as error:
            if error.errno not in LOST:
                raise
            detail = f"{error.strerror}: a file of its captions"
            return Item(clean(row.name), problem=(UNREADABLE, detail))

    def read(self, place: str) -> bytes:
        return (self.folder / place).read_bytes()

    def fingerprint(self) -> str:
        return digest(*("\n".join([str(row.picture), *row.texts]) for row in self._rows))


def visible(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """The relative names of all files in a folder but hidden ones; links to folders count not."""
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if buckets.is_remote(entry) or not pathlib.Path(entry).is_symlink():
                yield from visible(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name

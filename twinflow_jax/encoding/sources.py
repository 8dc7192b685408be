"""Where captions and pictures come from: folders, JSON lines and lists of prompts.

A source lists its items in an order that is always the same, in chunks that a process can read
alone; archives.py has the sources that keep many pictures in a file.
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import pathlib
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from etils import epath

from twinflow_jax import files
from twinflow_jax.errors import UserError

CAPTIONS = ("caption", "captions", "text", "prompt", "prompts")  # names of what holds them
IMAGES = ("image", "image_bytes", "file_name")
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"
)
NO_CAPTION, UNREADABLE = "no caption", "unreadable"
THREADS = 8  # that read and decode
# Kinds of OSError that stay: of a file, not of a storage that is away for a while.
LOST = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, 0)


@dataclasses.dataclass(frozen=True)
class Item:
    """A picture with its captions, or captions alone.

    id: unique in its source. place: what `read` finds the picture with, in JSON; None where
    there is none. problem: (reason, detail) where it cannot be used.
    """

    id: str
    captions: tuple[str, ...] = ()
    place: Any = None
    problem: tuple[str, str] | None = None


class Source(Protocol):
    """name: for people. pictures: whether its items have any. chunks: what `items` takes."""

    name: str
    pictures: bool
    chunks: Sequence[Any]

    def items(self, chunk: Any) -> Iterator[Item]:
        """The items of a chunk, always in the same order."""

    def read(self, place: Any) -> bytes:
        """A picture's file. From several threads at once.

        Raises:
          OSError: it cannot be read.
        """

    def fingerprint(self) -> str:
        """Another one for a source with other items, as far as can be told without reading all."""


def digest(*parts: str | bytes) -> str:
    """Of parts, whose limits count."""
    whole = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        whole.update(hashlib.sha256(data).digest())
    return whole.hexdigest()[:16]


def clean(text: str) -> str:
    """Text that can be written as UTF-8, which file names and JSON need not be."""
    return text.encode("utf-8", "replace").decode()


def captions_of(value: Any, depth: int = 2) -> tuple[str, ...]:
    """The captions in what a file has of them: a text, a list, or a dict that names them.

    Of a dict's names the first that has text counts; there may be another dict under it.
    Raises:
      UnicodeDecodeError: one is not UTF-8.
    """
    if isinstance(value, dict):
        keys = CAPTIONS if depth else ()
        return next(filter(None, (captions_of(value.get(key), depth - 1) for key in keys)), ())
    if isinstance(value, str | bytes):
        value = [value]
    texts = [v.decode("utf-8-sig") if isinstance(v, bytes) else v for v in list_of(value)]
    stripped = (clean(text).strip() for text in texts if isinstance(text, str))
    return tuple(text for text in stripped if text)


def list_of(value: Any) -> list:
    """A list, tuple or array as a list; of anything else an empty one."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, dict) else []


def keys_of(
    found: Iterable[str], given: str | None, usual: Sequence[str], flag: str, where
) -> list[str]:
    """The columns, or features, to use: the one that was given, or all usual ones.

    Raises:
      UserError: there is none.
    """
    wanted = usual if given is None else (given,)
    keys = [key for key in wanted if key in found]
    if not keys:
        there, wished = ", ".join(found) or "nothing", " or ".join(map(repr, wanted))
        raise UserError(f"{where} has no {wished}; it has {there}: give one with {flag}")
    return keys


def labelled(name: str, value: Any, place: Any) -> Item:
    """An item with the captions in what a file has of them."""
    try:
        return Item(name, captions_of(value), place)
    except UnicodeDecodeError as error:
        return Item(name, problem=(UNREADABLE, f"its caption: {error}"))


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


def suffix_of(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


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


def cut(items: Sequence, size: int) -> list[list]:
    """A sequence in parts of so many."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


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
            if "://" in str(entry) or not pathlib.Path(entry).is_symlink():
                yield from visible(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name


class Lines:
    """JSON lines: {"image": "a/b.jpg", "caption": "..."}; pictures lie in the file's folder.

    "captions" may hold a list, "id" a name; without pictures, prompts.
    """

    def __init__(
        self, file: epath.Path, pictures: bool, chunk: int, image: str | None, caption: str | None
    ):
        self.file, self.name = file, file.name
        self._image, self._caption = image, caption
        data = file.read_bytes()
        self._digest = digest(data)
        lines = files.text_lines(data, "surrogateescape")  # one that is not UTF-8 is left out
        if not lines:
            raise UserError(f"{file} is empty: write one JSON object a line")
        self.chunks = cut(lines, chunk)
        rows = lambda: (parsed(line) for _, line in lines)
        self.pictures = pictures and any(self._place(row) for row in rows())
        captions = CAPTIONS if caption is None else (caption,)
        lacks_captions = not any(key in row for row in rows() for key in captions)
        if lacks_captions:
            keys_of(fields(rows()), caption, CAPTIONS, "--caption-column", file)
        if pictures and not self.pictures:
            paths = fields(rows(), names_picture)
            if paths or image:
                raise UserError(
                    f"{file} has no pictures under {image or ', '.join(IMAGES)}; names of pictures "
                    f"are under {', '.join(paths) or 'none'}: give one with --image-column, or "
                    "--prompts-only"
                )

    def _place(self, row: Any) -> Any:
        keys = IMAGES if self._image is None else (self._image,)
        return next((row[key] for key in keys if row.get(key)), None)

    def items(self, chunk) -> Iterator[Item]:
        for number, line in chunk:
            row = parsed(line)
            name, place = row.get("id"), self._place(row)
            default = place if isinstance(place, str) else f"{self.name}:{number}"
            name = clean(name if isinstance(name, str) else default)
            if not row:
                yield Item(name, problem=(UNREADABLE, f"line {number} is no JSON object"))
            elif self.pictures and not inside(place):
                detail = f"line {number} names no file within the folder: {clean(str(place))}"
                yield Item(name, problem=(UNREADABLE, detail))
            else:
                found = row if self._caption is None else row.get(self._caption)
                yield labelled(name, found, place if self.pictures else None)

    def read(self, place: str) -> bytes:
        return (self.file.parent / place).read_bytes()

    def fingerprint(self) -> str:
        return self._digest


def fields(rows: Iterable[dict], among: Callable[[Any], bool] = lambda value: True) -> list[str]:
    """The keys in rows whose values are `among` those, each once."""
    return list(dict.fromkeys(key for row in rows for key in row if among(row[key])))


def names_picture(value: Any) -> bool:
    """Whether a field's value looks like the path of a picture, or several."""
    values = [value] if isinstance(value, str) else list_of(value)
    return any(isinstance(v, str) and suffix_of(v) in SUFFIXES for v in values)


def parsed(line: str) -> dict[str, Any]:
    """The JSON object of a line, {} where there is none."""
    try:
        row = json.loads(line.encode())  # what was not UTF-8 cannot be encoded
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def inside(place: Any) -> bool:
    """Whether a path from a file stays in the folder that it is relative to."""
    if not isinstance(place, str) or not place or "\0" in place or "://" in place:
        return False
    parts = place.replace("\\", "/").split("/")
    return not place.startswith(("/", "\\", "~")) and ".." not in parts


class Prompts:
    """A text file with one prompt a line."""

    pictures = False

    def __init__(self, file: epath.Path, chunk: int):
        self.name, data = file.name, file.read_bytes()
        self._digest = digest(data)
        try:
            self.chunks = cut(files.text_lines(data), chunk)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is no text in UTF-8 ({error}): save it as UTF-8") from error
        if not self.chunks:
            raise UserError(f"{file} is empty: write one prompt a line")

    def items(self, chunk) -> Iterator[Item]:
        for number, line in chunk:
            yield Item(f"{self.name}:{number}", captions_of(line))

    def fingerprint(self) -> str:
        return self._digest

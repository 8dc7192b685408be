"""Where captions and pictures come from: what sources share, JSON lines and lists of prompts.

A source lists its items in an order that is always the same, in chunks that a process can read
alone; beside.py has folders, archives.py the sources that keep many pictures in a file.
"""

import dataclasses
import errno
import hashlib
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

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
    there is none. problem: (reason, detail) where it cannot be used. sources: places of the
    pictures that it is an edit of.
    """

    id: str
    captions: tuple[str, ...] = ()
    place: Any = None
    problem: tuple[str, str] | None = None
    sources: tuple[Any, ...] = ()


@runtime_checkable
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
      ValueError: one of a list is no text, or one is not UTF-8.
    """
    if isinstance(value, dict):
        keys = CAPTIONS if depth else ()
        return next(filter(None, (captions_of(value.get(key), depth - 1) for key in keys)), ())
    if isinstance(value, str | bytes):
        value = [value]
    texts = [v.decode("utf-8-sig") if isinstance(v, bytes) else v for v in list_of(value)]
    for text in texts:
        if not isinstance(text, str | None):
            raise ValueError(f"{text!r} is no text")
    stripped = (clean(text).strip() for text in texts if text)
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


def labelled(name: str, value: Any, place: Any, where: str = "") -> Item:
    """An item with the captions in what a file has of them. where: that was, for messages."""
    try:
        return Item(name, captions_of(value), place)
    except ValueError as error:
        return Item(name, problem=(UNREADABLE, f"{where}its caption: {error}"))


def suffix_of(name: str) -> str:
    """A file's kind: what is after its last dot, with that, in small letters."""
    return posixpath.splitext(name)[1].lower()


def cut(items: Sequence, size: int) -> list[list]:
    """A sequence in parts of so many."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


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
        rows = lambda: (files.parsed(line) for _, line in lines)
        if not any(rows()):
            raise UserError(f"{file} line {lines[0][0]} is no JSON object: write one a line")
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
            row, where = files.parsed(line), f"{self.name} line {number}"
            name, place = row.get("id"), self._place(row)
            default = place if isinstance(place, str) else f"{self.name}:{number}"
            name = clean(name if isinstance(name, str) else default)
            if not row:
                yield Item(name, problem=(UNREADABLE, f"{where} is no JSON object"))
            elif self.pictures and place is None:
                yield Item(name, problem=(UNREADABLE, f"{where} names no picture"))
            elif self.pictures and not files.inside(place):
                detail = f"{where} names no file within the folder: {clean(str(place))}"
                yield Item(name, problem=(UNREADABLE, detail))
            else:
                found = row if self._caption is None else row.get(self._caption)
                yield labelled(name, found, place if self.pictures else None, f"{where}, ")

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


class Prompts(Source):
    """A text file with one prompt a line; without pictures there is nothing to `read`."""

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

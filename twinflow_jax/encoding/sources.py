"""Where captions and pictures come from: folders, JSON lines and lists of prompts.

A source lists its items in an order that is always the same, in chunks that a process can read
alone; archives.py has the sources that keep many pictures in a file.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from etils import epath

from twinflow_jax.errors import UserError

CAPTIONS = ("caption", "captions", "text", "prompt", "prompts")  # names of what holds them
IMAGES = ("image", "image_bytes", "file_name")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
NO_CAPTION, UNREADABLE = "no caption", "unreadable"
THREADS = 8  # that read and decode


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


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in what a file has of them: a text, a list, or a dict that names them."""
    if isinstance(value, dict):
        value = next((value[key] for key in CAPTIONS if key in value), ())
    if isinstance(value, str | bytes):
        value = [value]
    texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in list_of(value)]
    stripped = (clean(text).strip() for text in texts if isinstance(text, str))
    return tuple(text for text in stripped if text)


def list_of(value: Any) -> list:
    """A list, tuple or array as a list; of anything else an empty one."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, dict) else []


def from_lines(data: bytes) -> tuple[str, ...]:
    """One caption a line. Raises UnicodeDecodeError."""
    return captions_of(data.decode("utf-8-sig").splitlines())


def from_json(data: bytes) -> tuple[str, ...]:
    """Raises ValueError where it is no JSON in UTF-8."""
    try:
        return captions_of(json.loads(data.decode("utf-8-sig")))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


READERS = {".txt": from_lines, ".caption": from_lines, ".json": from_json}


def item(name: str, place: Any, caption: bytes | None, suffix: str) -> Item:
    """An item with the caption file that lies beside it, which has that suffix."""
    if caption is None:
        return Item(name, problem=(NO_CAPTION, "there is no caption beside it"))
    try:
        captions = READERS[suffix](caption)
    except ValueError as error:  # also of UTF-8
        return Item(name, problem=(UNREADABLE, f"its {suffix} file: {error}"))
    return Item(name, captions, place)


def cut(items: Sequence, size: int) -> list[list]:
    """A sequence in parts of so many."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


class Folder:
    """Pictures in a folder and the folders in it, each with captions beside it.

    CAT.jpg has its captions in CAT.txt, one a line, or in CAT.json.
    """

    def __init__(self, folder: epath.Path, pictures: bool, chunk: int):
        self.folder, self.name, self.pictures = folder, folder.name, pictures
        names = sorted(visible(folder))
        known = set(names)
        self._rows, beside = [], set()
        for name in names:
            stem, dot, suffix = name.rpartition(".")
            if dot + suffix.lower() not in SUFFIXES:
                continue
            texts = [stem + ending for ending in (".txt", ".json") if stem + ending in known]
            beside.update(texts)
            self._rows.append((name, texts[0] if texts else None))
        if not self._rows:
            raise UserError(
                f"{folder} holds no pictures ({' '.join(SUFFIXES)}): give a folder with pictures, "
                ".parquet or .tar files, or a prepared TFDS dataset"
            )
        texts = [name for name in names if name.endswith((".txt", ".json"))]
        self._rows += [(None, text) for text in texts if text not in beside]
        self.chunks = cut(self._rows, chunk)

    def items(self, chunk) -> Iterator[Item]:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
            yield from threads.map(self._item, chunk)

    def _item(self, row: tuple[str | None, str | None]) -> Item:
        name, text = row
        if name is None:
            return Item(clean(text), problem=(UNREADABLE, "a caption without a picture"))
        try:
            caption = None if text is None else (self.folder / text).read_bytes()
        except OSError as error:
            return Item(clean(name), problem=(UNREADABLE, f"{clean(text)}: {error.strerror}"))
        return item(clean(name), name, caption, "" if text is None else text[text.rindex(".") :])

    def read(self, place: str) -> bytes:
        return (self.folder / place).read_bytes()

    def fingerprint(self) -> str:
        return digest(*(f"{name}\n{text}" for name, text in self._rows))


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
        lines = [
            (number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip()
        ]
        if not lines:
            raise UserError(f"{file} is empty: write one JSON object a line")
        self.chunks = cut(lines, chunk)
        self.pictures = pictures and any(self._place(parsed(line)) for _, line in lines)

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
                yield Item(name, captions_of(found), place if self.pictures else None)

    def read(self, place: str) -> bytes:
        return (self.file.parent / place).read_bytes()

    def fingerprint(self) -> str:
        return self._digest


def parsed(line: bytes) -> dict[str, Any]:
    """The JSON object of a line, {} where there is none."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def inside(place: Any) -> bool:
    """Whether a path from a file stays in the folder that it is relative to."""
    if not isinstance(place, str) or not place or "\0" in place or "://" in place:
        return False
    parts = place.replace("\\", "/").split("/")
    return not place.startswith(("/", "\\", "~")) and ".." not in parts


class Prompts(Source):
    """A text file with one prompt a line; without pictures there is nothing to `read`."""

    pictures = False

    def __init__(self, file: epath.Path, chunk: int):
        self.name, data = file.name, file.read_bytes()
        self._digest = digest(data)
        try:
            lines = data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is no text in UTF-8 ({error}): save it as UTF-8") from error
        self.chunks = cut([(n, line) for n, line in enumerate(lines, 1) if line.strip()], chunk)
        if not self.chunks:
            raise UserError(f"{file} is empty: write one prompt a line")

    def items(self, chunk) -> Iterator[Item]:
        for number, line in chunk:
            yield Item(f"{self.name}:{number}", captions_of(line))

    def fingerprint(self) -> str:
        return self._digest

"""What a suite is: prompts, files as its official scorer reads them, and the scorer's answers."""

import collections
import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence

from etils import epath

from twinflow_jax.errors import UserError, few, reason

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt of a suite. id: begins its files' names. group: that it is counted in. text: drawn
    in the prompt's place. beside: (relative path, content) of a text beside its pictures. source:
    where the picture that it is about lies, as the suite's files say it."""

    id: str
    prompt: str
    group: str
    text: str = ""
    beside: tuple[str, bytes] | None = None
    source: str = ""


Read = Callable[[Item], bytes]
"""The file of the picture that an item is about; raises OSError where it cannot be read."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A scorer's result, of one picture or of all of an item. part: which picture, 0 of all.
    total, count: scores are sums of totals over sums of counts. file: what the scorer saw.
    further: other scores, of which those lines that have one are averaged as the totals are."""

    item: str
    part: int
    total: float
    count: float = 1.0
    file: str | None = None
    further: Mapping[str, float] = dataclasses.field(default_factory=dict)


def printed(pattern: str) -> Callable[[str], dict[str, str]]:
    """Finds the score that a scorer prints. pattern: whose group it is."""

    def said(text: str) -> dict[str, str]:
        match = re.search(pattern, text)
        return {"": match[1]} if match else {}

    return said


@dataclasses.dataclass(frozen=True)
class Suite:
    """title, judge: as tables name the suite, and whoever judged the paper's pictures.

    repository: on GitHub, with its commit. source: where the prompts lie in it, one file or several
    (a pattern of names). count, digest: of the published prompts; SHA-256, or how many each group
    has where no digest of them is known. parse: their contents by name to items. samples: pictures
    of each; grid: in one file, two by two. place: a picture's path, of an item's `id` and `k`,
    counted from `first`. allowed: pattern of what scorers leave in the folder. command: what to run
    in a clone of the repository, of {folder}, which is {name} in {parent}, {side} and {images}.

    parts: results of each item. read: (contents, items by id) -> lines and further scores by name,
    of a results file with the ending `results`. weights: of groups in the score, None where all
    items are one group. scale: of the score. said: the scorer's own numbers in what it prints or
    writes, by group, "" for the score. map: whether a file beside the folder maps prompts to
    pictures.

    Of one that edits pictures: sources: (files of prompts, --images) -> what reads the picture of
    an item. shown: path of a copy of it, of the item's `id`, where the scorer wants one. content:
    of a file of prompts, what counts of it. dataset: where the prompts lie on the Hugging Face hub,
    for a suite that has them there.
    """

    name: str
    title: str
    judge: str
    repository: str
    source: tuple[str, str]
    count: int
    digest: str | Mapping[str, int]
    parse: Callable[[dict[str, bytes]], list[Item]]
    place: str
    command: str
    read: Callable[[str, Mapping[str, Item]], tuple[list[Line], dict[str, float]]]
    results: str
    said: Callable[[str], dict[str, str]]
    samples: int = 1
    first: int = 0
    grid: bool = False
    parts: int = 1
    weights: Mapping[str, float] | None = None
    scale: float = 1.0
    allowed: str = r"(?!)"
    map: bool = False
    sources: Callable[[Sequence[epath.Path], str | None], Read] | None = None
    shown: str = ""
    content: Callable[[epath.Path], bytes] = lambda file: file.read_bytes()
    dataset: str = ""

    @property
    def home(self) -> str:
        """Where the prompts lie."""
        hub = f"huggingface.co/datasets/{self.dataset}"
        return hub if self.dataset else f"github.com/{self.repository}"

    @property
    def edits(self) -> bool:
        """Whether its prompts are about pictures."""
        return self.sources is not None

    def pictures(self, item: Item) -> list[str]:
        """Relative paths of an item's picture files."""
        numbers = range(1 if self.grid else self.samples)
        return [self.place.format(id=item.id, k=self.first + k) for k in numbers]

    def files(self, item: Item) -> list[str]:
        """Relative paths of all files of an item."""
        found = [item.beside[0]] if item.beside else []
        found += [self.shown.format(id=item.id)] if self.shown else []
        return found + self.pictures(item)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises UserError for a (width, height) that the scorer cannot cut out of a grid."""
        if self.grid and size[0] != size[1]:
            raise UserError(
                f"{self.name} cuts its grids into squares, not into {size[0]}x{size[1]}: give "
                f"--size {max(size)}"
            )

    def commands(self, folder: epath.Path, side: int, images: epath.PathLike | None) -> str:
        """What scores a folder, to be copied. images: where the pictures of prompts lie."""
        places = {
            "folder": folder, "name": folder.name, "parent": folder.parent, "images": images
        }
        quoted = {name: shlex.quote(str(place)) for name, place in places.items()}
        return self.command.format(side=side, **quoted)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A suite's items. digest: of their files; published: whether that is the published one's.
    rewritten: digest of the texts drawn in their place, None where they are drawn. read: as of
    `Suite.sources`, None where there are none."""

    items: tuple[Item, ...]
    digest: str
    published: bool
    rewritten: str | None = None
    read: Read | None = None


def open_prompts(
    suite: Suite, path: str, unpublished: bool = False, rewritten: str | None = None,
    images: str | None = None,
) -> Prompts:
    """A suite's prompts from a clone of its repository, or from the file or folder in it.

    unpublished: take others than the published ones. rewritten: as of `rewrite`. images: folder of
    the pictures that they are about, where the prompts' files do not hold them.
    Raises:
      UserError: they are not there, or others or of another number than the published ones.
    """
    found = _files(suite, path)
    try:
        contents = {file.name: suite.content(file) for file in found}
        items = suite.parse(contents)
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--prompts {path} are no prompts of {suite.name} ({reason(error)})") from (
            error
        )
    digest = _digest(contents)
    groups = collections.Counter(item.group for item in items)
    published = suite.digest in (digest, groups)
    if not published and not unpublished:
        what = "others" if len(items) == suite.count else f"{len(items):,}, not {suite.count:,}"
        raise UserError(
            f"--prompts {path} are not the published ones of {suite.name} ({what}): take those of "
            f"{suite.home}, or say --unpublished"
        )
    if len({item.id for item in items}) < len(items) or not items:
        raise UserError(f"--prompts {path} hold no prompts, or two of one number")
    for item in items:
        if not all(map(is_inside, (item.id, item.source or item.id))):
            raise UserError(f"--prompts {path}: {item.id!r} names a file of another folder")
    of_texts = None
    if rewritten is None:
        items = [dataclasses.replace(item, text=item.prompt) for item in items]
    else:
        items, of_texts = rewrite(items, rewritten)
    if images and not suite.edits:
        raise UserError(f"--images cannot be used: the prompts of {suite.name} are of no pictures")
    read = suite.sources(found, images) if suite.sources else None
    return Prompts(tuple(items), digest, published, of_texts, read)


def is_inside(path: str) -> bool:
    """Whether a relative path stays in its folder."""
    return "\0" not in path and not {"", ".", ".."} & set(path.split("/"))


def _files(suite: Suite, path: str) -> list[epath.Path]:
    """The suite's prompt files."""
    folder, pattern = suite.source
    places = [epath.Path(path) / folder, epath.Path(path)]
    try:
        for place in places:
            if place.is_dir():
                names = [e for e in place.iterdir() if re.fullmatch(pattern, e.name)]
                if names:
                    return sorted(names)
        if places[1].is_file():
            return [places[1]]
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read ({error.strerror or error})") from error
    raise UserError(
        f"--prompts {path} has no prompts of {suite.name}: give a clone of "
        f"{suite.home}, whose {folder or '.'} holds them"
    )


def _digest(contents: Mapping[str, bytes]) -> str:
    """SHA-256 of a file, or of several with their names."""
    if len(contents) == 1:
        return hashlib.sha256(*contents.values()).hexdigest()
    parts = (name.encode() + b"\0" + data + b"\0" for name, data in sorted(contents.items()))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def rewrite(items: Sequence[Item], path: str) -> tuple[list[Item], str]:
    """Items that draw other texts, and the texts' digest.

    path: a file of JSON lines {"prompt": of the suite, "text": in its place}, or of a JSON list of
    {"prompt_id", "Prompt"}; or a folder with several, as WISE's rewritten prompts.
    Raises:
      UserError: it cannot be read, or lacks a prompt.
    """
    place = epath.Path(path)
    try:
        names = [place] if place.is_file() else sorted(
            file for file in place.iterdir() if file.name.endswith("_rewrite.json")
        )
        contents = {file.name: file.read_bytes() for file in names}
        rows = [row for data in contents.values() for row in json_rows(data.decode())]
        texts = {row.get("prompt", str(row.get("prompt_id"))): row for row in rows}
        texts = {key: str(row.get("text", row.get("Prompt"))) for key, row in texts.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--rewritten {path} cannot be read ({reason(error)})") from error
    found = [texts.get(item.prompt, texts.get(item.id)) for item in items]
    lacking = [item.prompt for item, text in zip(items, found, strict=True) if not text]
    if lacking:
        raise UserError(f"--rewritten {path} has no text for {few(lacking, 1)}")
    made = [dataclasses.replace(i, text=text) for i, text in zip(items, found, strict=True)]
    return made, _digest(contents)


def json_rows(text: str) -> list[dict]:
    """Of a JSON list, or of JSON lines. Raises ValueError where it is neither."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]

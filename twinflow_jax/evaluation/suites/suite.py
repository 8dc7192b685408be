"""What a suite is: prompts, files as its official scorer reads them, and the scorer's answers."""

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence

from etils import epath

from twinflow_jax.errors import UserError, few, reason

Places = Mapping[str, tuple[int, int] | None]
"""Relative paths, each with the (width, height) of its picture, or None where it is text."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt of a suite. id: begins its files' names. group: that it is counted in. text: drawn
    in the prompt's place. beside: (relative path, content) of a file beside its pictures."""

    id: str
    prompt: str
    group: str
    text: str = ""
    beside: tuple[str, bytes] | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """A scorer's result, of one picture or of all of an item. part: which picture, 0 of all.
    total, count: scores are sums of totals over sums of counts. file: what the scorer saw."""

    item: str
    part: int
    total: float
    count: float = 1.0
    file: str | None = None


@dataclasses.dataclass(frozen=True)
class Suite:
    """title, judge: as tables name the suite, and whoever judged the paper's pictures.

    repository: on GitHub, with its commit. source: where the prompts lie in it, one file or several
    (a pattern of names). count, digest: of the published prompts; SHA-256. parse: their contents by
    name to items. samples: pictures of each; grid: in one file, two by two. place: a picture's
    path, of an item's `id` and `k`, counted from `first`. allowed: pattern of what scorers leave in
    the folder. command: what to run in a clone of the repository, of {folder}, {side} and
    {prompts}.

    parts: results of each item. read: (contents, items by id) -> lines and further scores by name,
    of a results file with the ending `results`. weights: of groups in the score, None where all
    items are one group. scale: of the score. said: pattern of the scorer's own score in what it
    prints or writes. map: whether a file beside the folder maps prompts to pictures.
    """

    name: str
    title: str
    judge: str
    repository: str
    source: tuple[str, str]
    count: int
    digest: str
    parse: Callable[[dict[str, bytes]], list[Item]]
    place: str
    command: str
    read: Callable[[str, Mapping[str, Item]], tuple[list[Line], dict[str, float]]]
    results: str
    said: str
    samples: int = 1
    first: int = 0
    grid: bool = False
    parts: int = 1
    weights: Mapping[str, float] | None = None
    scale: float = 1.0
    allowed: str = r"(?!)"
    map: bool = False

    def pictures(self, item: Item) -> list[str]:
        """Relative paths of an item's picture files."""
        numbers = range(1 if self.grid else self.samples)
        return [self.place.format(id=item.id, k=self.first + k) for k in numbers]

    def files(self, item: Item, size: tuple[int, int]) -> Places:
        """An item's files. size: (width, height) of one picture."""
        times = 2 if self.grid else 1
        found = dict.fromkeys(self.pictures(item), (times * size[0], times * size[1]))
        return found | ({item.beside[0]: None} if item.beside else {})

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises UserError for a (width, height) that the scorer cannot cut out of a grid."""
        if self.grid and size[0] != size[1]:
            raise UserError(
                f"{self.name} cuts its grids into squares, not into {size[0]}x{size[1]}: give "
                f"--size {max(size)}"
            )

    def commands(self, folder: epath.Path, side: int, prompts: str) -> str:
        """What scores a folder, to be copied."""
        quoted = lambda text: shlex.quote(str(text))
        return self.command.format(folder=quoted(folder), side=side, prompts=quoted(prompts))


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A suite's items. digest: of their files; published: whether that is the published one's.
    rewritten: digest of the texts drawn in their place, None where they are drawn."""

    items: tuple[Item, ...]
    digest: str
    published: bool
    rewritten: str | None = None


def open_prompts(
    suite: Suite, path: str, unpublished: bool = False, rewritten: str | None = None
) -> Prompts:
    """A suite's prompts from a clone of its repository, or from the file or folder in it.

    unpublished: take others than the published ones. rewritten: as of `rewrite`.
    Raises:
      UserError: they are not there, or others or of another number than the published ones.
    """
    contents = _contents(suite, path)
    digest = _digest(contents)
    try:
        items = suite.parse(contents)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--prompts {path} are no prompts of {suite.name} ({reason(error)})") from (
            error
        )
    published = digest == suite.digest
    if not published and not unpublished:
        what = "others" if len(items) == suite.count else f"{len(items):,}, not {suite.count:,}"
        raise UserError(
            f"--prompts {path} are not the published ones of {suite.name} ({what}): take those of "
            f"github.com/{suite.repository}, or say --unpublished"
        )
    if len({item.id for item in items}) < len(items) or not items:
        raise UserError(f"--prompts {path} hold no prompts, or two of one number")
    if rewritten is None:
        items = [dataclasses.replace(item, text=item.prompt) for item in items]
        return Prompts(tuple(items), digest, published)
    items, of_texts = rewrite(items, rewritten)
    return Prompts(tuple(items), digest, published, of_texts)


def _contents(suite: Suite, path: str) -> dict[str, bytes]:
    """The suite's prompt files by name."""
    folder, pattern = suite.source
    places = [epath.Path(path) / folder, epath.Path(path)]
    try:
        for place in places:
            if place.is_dir():
                names = [e for e in place.iterdir() if re.fullmatch(pattern, e.name)]
                if names:
                    return {file.name: file.read_bytes() for file in sorted(names)}
        if places[1].is_file():
            return {places[1].name: places[1].read_bytes()}
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read ({error.strerror or error})") from error
    raise UserError(
        f"--prompts {path} has no prompts of {suite.name}: give a clone of "
        f"github.com/{suite.repository}, whose {folder or '.'} holds them"
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

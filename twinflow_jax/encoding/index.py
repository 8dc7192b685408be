"""The listing that all processes share: what each item of a source is, and where it will go.

Each process looks through its chunks of the source. What follows from all listings, duplicates,
sizes and the files of records, every process works out for itself, and alike.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import threading
import warnings
from collections.abc import Sequence
from typing import Any

from etils import epath

from twinflow_jax import files, images
from twinflow_jax.data.records import PROMPTS
from twinflow_jax.encoding import sizes
from twinflow_jax.encoding.sources import (
    LOST,
    NO_CAPTION,
    THREADS,
    UNREADABLE,
    Item,
    Source,
    digest,
)
from twinflow_jax.errors import UserError, reason

TOO_SMALL, TOO_LARGE, DUPLICATE = "too small", "too large", "duplicate"
LOOKING = threading.Lock()

Key = tuple[int, int]  # of an item: its chunk, and its place there


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as it was found. image: digest of its file."""

    place: Any
    image: str
    size: sizes.Size


@dataclasses.dataclass(frozen=True)
class Entry:
    """An item as it was found. image: digest of its file. problem: (reason, detail), if any.
    sources: of an edit."""

    id: str
    captions: tuple[str, ...] = ()
    place: Any = None
    image: str = ""
    size: sizes.Size = (0, 0)
    problem: tuple[str, str] | None = None
    sources: tuple[Picture, ...] = ()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All that belong to it, its own first."""
        return Picture(self.place, self.image, self.size), *self.sources

    @classmethod
    def from_json(cls, line: str) -> "Entry":
        fields = json.loads(line)
        for name in ("captions", "size", "problem"):
            fields[name] = tuple(fields[name]) if fields[name] is not None else None
        fields["sources"] = tuple(
            Picture(one["place"], one["image"], tuple(one["size"]))
            for one in fields.get("sources", ())  # of a listing from before there were any
        )
        return cls(**fields)


def chunk_file(work: epath.Path, chunk: int) -> epath.Path:
    return work / "index" / f"{chunk:06d}.jsonl"


def write_chunk(work: epath.Path, source: Source, chunk: int, min_side: int) -> None:
    """Looks through a chunk of a source.

    Raises:
      UserError: a picture cannot be read for a reason that may pass.
    """
    look = functools.partial(examine, source, min_side=min_side)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        entries = list(threads.map(look, source.items(source.chunks[chunk])))
    lines = [json.dumps(dataclasses.asdict(entry)) + "\n" for entry in entries]
    files.write(chunk_file(work, chunk), "".join(lines).encode())
    read_chunk.cache_clear()  # of a try before


def examine(source: Source, item: Item, min_side: int) -> Entry:
    """What an item is, from its file's bytes and header."""
    problem = lambda reason, detail: Entry(item.id, problem=(reason, detail))
    if item.problem:
        return problem(*item.problem)
    if not item.captions:
        return problem(NO_CAPTION, "it is empty")
    if not source.pictures:
        return Entry(item.id, item.captions)
    found = []
    for number, place in enumerate((item.place, *item.sources)):
        which = f"source {number}: " if number else ""
        try:
            data = source.read(place)
        except OSError as error:
            why = error.strerror or str(error)
            if error.errno not in LOST:
                raise UserError(f"{item.id} cannot be read now ({which}{why})") from error
            return problem(UNREADABLE, which + why)
        # Threads share what catches warnings. Decoding, which repeats these, is silent (encode.py).
        with LOOKING:
            try:
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    size = sizes.measure(data)
            except images.TooLarge as error:
                return problem(TOO_LARGE, f"{which}{error}")
            except Exception as error:  # Pillow raises many kinds
                return problem(UNREADABLE, which + reason(error))
            for warning in told:
                warnings.warn(f"{item.id}: {reason(warning.message)}", stacklevel=2)
        if min(size) < min_side:
            return problem(TOO_SMALL, f"{which}it is {sizes.name(size)}")
        if number and max(size) > images.LONGEST:
            return problem(TOO_LARGE, f"{which}it is {sizes.name(size)}")
        found.append(Picture(place, hashlib.sha256(data).hexdigest(), size))
    one, *sources = found
    return Entry(
        item.id, item.captions, one.place, one.image, one.size, sources=tuple(sources)
    )


@functools.lru_cache(maxsize=64)
def read_chunk(work: epath.Path, chunk: int) -> tuple[Entry, ...]:
    lines = chunk_file(work, chunk).read_text().splitlines()
    return tuple(Entry.from_json(line) for line in lines)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records to be. size: of its pictures, None for prompts. first: the number of its
    first item among those of its split. of: files of the split. sources: sizes of the pictures
    that they are edits of."""

    split: str
    size: sizes.Size | None
    number: int
    of: int
    first: int
    keys: tuple[Key, ...]
    sources: tuple[sizes.Size, ...] = ()

    @property
    def sizes(self) -> tuple[sizes.Size, ...]:
        """Of all pictures of a record, its own first; none for prompts."""
        return (self.size, *self.sources) if self.size else ()


@dataclasses.dataclass(frozen=True)
class Skipped:
    id: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which records go where, and what is left out."""

    shards: list[Shard]
    skipped: dict[Key, Skipped]


def plan(
    work: epath.Path, chunks: int, choices: Sequence[sizes.Size], shard_size: int
) -> Plan:
    """Everything that follows from the listings.

    choices: the sizes that pictures go to; none for prompts. Sources of an edit that are in
    proportion with it go to its size, others to their own. Of items alike in pictures and captions
    all but the first are left out.
    """
    seen, skipped, splits = {}, {}, collections.defaultdict(list)
    numbered = ((n, row) for n in range(chunks) for row in enumerate(read_chunk(work, n)))
    for chunk, (row, entry) in numbered:  # in the source's order
        key = chunk, row
        if entry.problem:
            skipped[key] = Skipped(entry.id, *entry.problem)
            continue
        content = digest(entry.image, *entry.captions, *(one.image for one in entry.sources))
        if content in seen:
            skipped[key] = Skipped(entry.id, DUPLICATE, f"the same as {seen[content]}")
            continue
        seen[content] = entry.id
        found = entry.size if entry.image else (choices[0] if choices else None)
        size = sizes.nearest(found, choices) if choices else None
        beside = (
            size if sizes.alike(one.size, found) else sizes.nearest(one.size, choices)
            for one in entry.sources
        )
        splits[size, *beside].append(key)
    shards = []
    for found in sorted(splits, key=str):
        keys, (size, *sources) = splits[found], found
        split = PROMPTS if size is None else "_".join(map(sizes.name, found))
        starts = range(0, len(keys), shard_size)
        shards += [
            Shard(
                split, size, n, len(starts), start, tuple(keys[start : start + shard_size]),
                tuple(sources),
            )
            for n, start in enumerate(starts)
        ]
    return Plan(shards, skipped)

"""A folder of a suite's pictures: nothing else lies in it, its manifest and the work beside."""

import concurrent.futures
import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from twinflow_jax import files, images, sharing
from twinflow_jax.errors import UserError
from twinflow_jax.evaluation.suites import suite as suites
from twinflow_jax.evaluation.suites.suite import Item, Size, Suite

LOOK = 10.0  # seconds between two reports of how far all processes are
THREADS = 8  # that read pictures


@dataclasses.dataclass(frozen=True)
class Gallery(sharing.Shares):
    """folder: of the pictures. process, processes: which of how many this one is."""

    MADE = "pictures"

    def beside(self, ending: str) -> epath.Path:
        return self.folder.parent / (self.folder.name + ending)

    @property
    def work(self) -> epath.Path:
        return self.beside(".work")

    @property
    def settings_file(self) -> epath.Path:
        return self.beside(".manifest.json")

    def embeddings_file(self, unit: Sequence[int]) -> epath.Path:
        """Where a unit's prompts wait for their turn, encoded."""
        return self.work / "text" / f"{unit[0]:05d}.safetensors"

    def done_files(self) -> list[epath.Path]:
        """Of each process, once it has drawn its share."""
        return [self.work / "done" / f"{n}_of_{self.processes}" for n in range(self.processes)]

    def names(self) -> set[str]:
        """Relative paths of all files that are there."""
        return set(_names(self.folder, "")) if self.folder.exists() else set()


def _names(folder: epath.Path, before: str) -> Iterator[str]:
    for entry in folder.iterdir():
        if not entry.suffix and entry.is_dir():  # buckets answer slowly, and ours have endings
            yield from _names(entry, f"{before}{entry.name}/")
        else:
            yield before + entry.name


def manifest_of(folder: epath.Path) -> dict[str, Any]:
    """What a folder's pictures are.

    Raises:
      UserError: no suite was drawn there.
    """
    file = Gallery(folder, 0, 1).settings_file
    try:
        found = json.loads(file.read_text())
        return found | {"size": tuple(found["size"]) if found["size"] else None}
    except OSError as error:
        raise UserError(
            f"{folder} has no {file.name} beside it: draw with `evaluate suite draw`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): draw in another folder") from error


def prompts_of(
    suite: Suite, manifest: Mapping[str, Any], path: str | None, images: str | None = None
) -> suites.Prompts:
    """Those that a folder was drawn from. path, images: where they lie now (default: where they
    did).

    Raises:
      UserError: they are not there any more, or others.
    """
    images = images or manifest.get("images_path")
    found = suites.open_prompts(suite, path or manifest["prompts_path"], True, images=images)
    if found.digest != manifest["prompts"]:
        raise UserError(
            f"--prompts {path or manifest['prompts_path']} are not those that were drawn: give "
            "these"
        )
    return found


class Progress:
    """How far all processes are, on stderr now and then."""

    def __init__(self, gallery: Gallery, total: int, left: int):
        self._gallery, self._total, self._left = gallery, total, left
        self._begin = self._told = time.monotonic()
        self._first, self._drawn = 0, 0
        self._tell()

    def _file(self, process: int) -> epath.Path:
        return self._gallery.work / "progress" / f"{process}_of_{self._gallery.processes}"

    def update(self, count: int) -> None:
        """More pictures are there; the first are not counted in the rate, since they wait for the
        compiler."""
        now = time.monotonic()
        if not self._first:
            self._first, self._begin = count, now
        self._drawn, self._left = self._drawn + count, self._left - count
        if now - self._told >= LOOK or not self._left:
            self._told = now
            self._tell()

    def _tell(self) -> None:
        seconds = time.monotonic() - self._begin
        rate = (self._drawn - self._first) / seconds if seconds > 0 else 0.0
        mine = {"left": self._left, "rate": rate if self._left else 0.0}
        files.write(self._file(self._gallery.process), json.dumps(mine).encode())
        found = []
        for process in range(self._gallery.processes):
            try:
                found.append(json.loads(self._file(process).read_text()))
            except (OSError, ValueError):  # it has not begun
                continue
        if not self._drawn:
            return
        left, rate = (sum(one[key] for one in found) for key in ("left", "rate"))
        silent = self._gallery.processes - len(found)
        line = f"{self._total - left:,} of {self._total:,} pictures"
        line += f", {rate:.2f} a second" if rate else ""
        line += f", {duration(left / rate)} left" if rate and left else ""
        line += f"; {silent} of {self._gallery.processes} processes have not begun" * bool(silent)
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """As people say it: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@dataclasses.dataclass(frozen=True)
class Found:
    """Problems by kind, each with the relative paths that have it. files: that belong there."""

    problems: Mapping[str, Sequence[str]]
    files: int


def check(
    gallery: Gallery, suite: Suite, items: Sequence[Item], sizes: Sequence[Size],
    source: Callable[[Item], Image.Image] | None = None,
) -> Found:
    """Every file of a suite against what its scorer wants. sizes: of each item's pictures. source:
    the picture that an item is about."""
    wanted: dict[str, Callable[[bytes], str | None]] = {}
    for item, size in zip(items, sizes, strict=True):
        wanted |= dict.fromkeys(suite.pictures(item), functools.partial(_picture, suite, size))
        if item.beside:
            wanted[item.beside[0]] = functools.partial(_text, item.beside[1])
        if suite.shown:
            wanted[suite.shown.format(id=item.id)] = functools.partial(_copy, source, item)
    there = gallery.names()
    problems: dict[str, list[str]] = {
        "missing": sorted(wanted.keys() - there),
        "foreign": sorted(
            name for name in there - wanted.keys() if not re.fullmatch(suite.allowed, name)
        ),
    }

    problem = lambda name: wanted[name]((gallery.folder / name).read_bytes())
    looked = sorted(wanted.keys() & there)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        for name, kind in zip(looked, threads.map(problem, looked), strict=True):
            if kind:
                problems.setdefault(kind, []).append(name)
    return Found({kind: names for kind, names in problems.items() if names}, len(wanted))


def _text(content: bytes, data: bytes) -> str | None:
    """What is wrong with a text."""
    return None if data == content else "changed"


def _picture(suite: Suite, size: Size, data: bytes) -> str | None:
    """What is wrong with a file of pictures of a size."""
    pixels, times = _pixels(data), 2 if suite.grid else 1
    if pixels is None:
        return "torn"
    return None if pixels.shape == (times * size[1], times * size[0], 3) else "of another size"


def _copy(source: Callable[[Item], Image.Image], item: Item, data: bytes) -> str | None:
    """What is wrong with a copy of the picture that an item is about."""
    pixels = _pixels(data)
    if pixels is None:
        return "torn"
    return None if np.array_equal(pixels, np.asarray(source(item))) else "changed"


def _pixels(data: bytes) -> np.ndarray | None:
    """Of a whole picture; None of anything else."""
    try:
        return np.asarray(images.opened(data))
    except Exception:  # Pillow raises many kinds
        return None

"""Work that several processes share in a folder: whose it is, who does what, what is awaited.

Each does every n-th thing, and may be killed at any moment: what is there is not done again.
"""

import contextlib
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from etils import epath

from twinflow_jax import files, holders
from twinflow_jax.errors import UserError

PAUSE = 0.5  # seconds between two looks for what other processes have done


@dataclasses.dataclass(frozen=True)
class Shares:
    """folder: of what is made. process, processes: which of how many this one is. MADE: what is
    made, in messages."""

    folder: epath.Path
    process: int
    processes: int

    MADE: ClassVar[str] = "work"

    @property
    def work(self) -> epath.Path:
        """Where what only the work needs lies."""
        raise NotImplementedError

    @property
    def settings_file(self) -> epath.Path:
        """What the work is of."""
        raise NotImplementedError

    @contextlib.contextmanager
    def claim(self, settings: dict[str, Any], about: dict[str, Any] | None = None) -> Iterator:
        """The folder as that of these settings, and this process as the only one that does its
        share.

        One in which nothing was made and nobody works is of a try that came to nothing, and is
        made this one's. about: what the file of settings says besides, which may differ.
        Raises:
          UserError: it holds something else, which is named, or another process does this share,
            or the work is shared among another number of processes.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file: choose another folder")
        found = sorted(e.name for e in self.folder.iterdir()) if self.folder.exists() else []
        others = [name for name in found if name != self.work.name]
        if others and not self.settings_file.exists():
            raise UserError(
                f"{self.folder} holds other files ({', '.join(others[:3])}): choose another folder"
            )
        if others:
            self.compare(settings, json.loads(self.settings_file.read_text()))
        mine = self.work / f"in_use_{self.process}_of_{self.processes}"
        with holders.held(mine, f"share {self.process} of {self.processes} in {self.folder}"):
            for entry in self.work.iterdir():
                if re.fullmatch(rf"in_use_\d+_of_(?!{self.processes}$)\d+", entry.name):
                    holders.check_free(entry, self.folder)
            with holders.alone(self.work / "beginning"):  # as others may at the same moment
                self._begin(settings, settings | (about or {}), mine)
            yield

    def _begin(self, settings: dict[str, Any], told: dict[str, Any], mine: epath.Path) -> None:
        """Writes what the work is of, where that is not there. mine: the file that holds it."""
        file = self.settings_file
        if file.exists() and differing(settings, json.loads(file.read_text())):
            entries = list(self.work.iterdir())
            for entry in entries:
                if entry.name.startswith("in_use_") and entry != mine:
                    holders.check_free(entry, self.folder)
            for entry in entries:
                if entry.is_dir():
                    entry.rmtree()
            file.unlink()
        if not file.exists():
            files.write(file, json.dumps(told, indent=1).encode())

    def compare(self, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
        """Raises UserError where the folder's settings are others."""
        for key in differing(mine, theirs):
            raise UserError(
                f"{self.folder} is of other {self.MADE}: their {key} is {theirs.get(key)}, not "
                f"{mine[key]}: give the same again, or choose another folder"
            )

    def mine(self, things: Iterable) -> list[tuple[int, Any]]:
        """Those that this process does, with their numbers."""
        return [(n, t) for n, t in enumerate(things) if n % self.processes == self.process]

    def wait(self, wanted: list[epath.Path], what: str, stop: Callable[[], bool]) -> bool:
        """Waits until files are there, `wanted[n]` by process n % processes; whether they are.

        stop: whether there is nothing to wait for any more.
        """
        told = False
        while True:
            folder = wanted[0].parent if wanted else self.work
            names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
            missing = [n for n, file in enumerate(wanted) if file.name not in names]
            if not missing or stop():
                return not missing
            if not told:
                others = ", ".join(map(str, sorted({n % self.processes for n in missing})))
                print(
                    f"waiting for {what} of process {others} (of {self.processes}): start those "
                    "that do not run", file=sys.stderr, flush=True,
                )
                told = True
            time.sleep(PAUSE)


def differing(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The settings that are others in a folder's record."""
    return [key for key in mine if json.loads(json.dumps(mine[key])) != theirs.get(key)]

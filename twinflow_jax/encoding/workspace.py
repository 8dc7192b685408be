"""The folder that processes write records to: whose it is, what is done, what is awaited."""

import collections
import contextlib
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from twinflow_jax import files, holders
from twinflow_jax.data import records
from twinflow_jax.encoding.index import Key, Plan, Shard, Skipped
from twinflow_jax.errors import UserError

WORK, SETTINGS, SKIPPED = "work", "settings.json", "skipped.jsonl"
PAUSE = 0.5  # seconds between two looks for what other processes have done


@dataclasses.dataclass
class ShardReport:
    """Of a file of records, counted while it is written. cut: captions that lost their end.
    skipped: pictures that turned out to be damaged."""

    records: int = 0
    bytes: int = 0
    cut: int = 0
    skipped: dict[Key, Skipped] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        skipped = [[list(key), dataclasses.astuple(s)] for key, s in self.skipped.items()]
        return json.dumps({**vars(self), "skipped": skipped})

    @classmethod
    def from_json(cls, text: str) -> "ShardReport":
        fields = json.loads(text)
        skipped = {tuple(key): Skipped(*values) for key, values in fields.pop("skipped")}
        return cls(**fields, skipped=skipped)


@dataclasses.dataclass(frozen=True)
class Workspace:
    """folder: of the records. process, processes: which of how many this one is."""

    folder: epath.Path
    process: int
    processes: int

    @property
    def work(self) -> epath.Path:
        return self.folder / WORK

    @property
    def finished(self) -> bool:
        return (self.folder / records.RECORD).exists()

    @contextlib.contextmanager
    def claim(self, settings: dict[str, Any]) -> Iterator[bool]:
        """The folder as that of these settings, and this process as the only one that does its
        share; gives whether it is finished already.

        One in which no record is and nobody works is of a try that came to nothing, and is made
        this one's.
        Raises:
          UserError: it holds something else, which is named, or another process does this share,
            or the work is shared among another number of processes.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file: choose another folder")
        found = sorted(e.name for e in self.folder.iterdir()) if self.folder.exists() else []
        if self.finished:
            report = records.open_records(self.folder).report
            self._compare(settings, report.get("settings", {}))
            if self.process == 0 and self.work.exists():  # it was killed after the last file
                self.work.rmtree()
            yield True
            return
        others = [name for name in found if name != WORK]
        if others and not (self.work / SETTINGS).exists():
            raise UserError(
                f"{self.folder} holds other files ({', '.join(others[:3])}): choose another folder"
            )
        if others:
            self._compare(settings, json.loads((self.work / SETTINGS).read_text()))
        mine = self.work / f"in_use_{self.process}_of_{self.processes}"
        with holders.held(mine, f"share {self.process} of {self.processes} in {self.folder}"):
            for entry in self.work.iterdir():
                if re.fullmatch(rf"in_use_\d+_of_(?!{self.processes}$)\d+", entry.name):
                    holders.check_free(entry, self.folder)
            with holders.alone(self.work / "beginning"):  # as others may at the same moment
                self._begin(settings, mine)
            yield False

    def _begin(self, settings: dict[str, Any], mine: epath.Path) -> None:
        """Writes what the work is of, where that is not there. mine: the file that holds it."""
        file = self.work / SETTINGS
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
            files.write(file, json.dumps(settings, indent=1).encode())

    def _compare(self, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
        for key in differing(mine, theirs):
            raise UserError(
                f"{self.folder} is of other records: their {key} is {theirs.get(key)}, not "
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

    def report_file(self, shard: Shard) -> epath.Path:
        return self.work / "reports" / f"{shard.split}-{shard.number:05d}.json"

    def shard_file(self, shard: Shard) -> epath.Path:
        return records.shard_file(self.folder, shard.split, shard.number, shard.of)

    def close(
        self, plan: Plan, manifest: records.Manifest, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Makes the written files a dataset and removes what only the work needed; the report."""
        skipped, parts, cut = dict(plan.skipped), collections.defaultdict(list), 0
        for shard in plan.shards:
            done = ShardReport.from_json(self.report_file(shard).read_text())
            parts[shard.split].append((done.records, done.bytes))
            skipped |= done.skipped
            cut += done.cut
        if not any(count for files_ in parts.values() for count, _ in files_):
            for file in (*map(self.shard_file, plan.shards), self.folder / records.NULL):
                file.unlink(missing_ok=True)  # so that the folder can be another try's
            raise nothing_in(skipped)
        in_order = [skipped[key] for key in sorted(skipped)]
        lines = [json.dumps(dataclasses.asdict(one)) + "\n" for one in in_order]
        files.write(self.folder / SKIPPED, "".join(lines).encode())
        report = {
            "settings": settings,
            "records": {split: sum(count for count, _ in of) for split, of in parts.items()},
            "skipped": dict(collections.Counter(one.reason for one in in_order)),
            "cut": cut,
        }
        records.finish(self.folder, manifest, parts, report)
        self.work.rmtree()
        return report


def differing(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The settings that are others in a folder's record."""
    return [key for key in mine if json.loads(json.dumps(mine[key])) != theirs.get(key)]


def nothing_in(skipped: dict[Key, Skipped]) -> UserError:
    """Says why nothing of a source can be used."""
    first = [skipped[key] for key in sorted(skipped)[:3]]
    return UserError(
        f"none of the {len(skipped)} items of the source can be used: "
        + "; ".join(f"{one.id} {one.reason} ({one.detail})" for one in first)
    )

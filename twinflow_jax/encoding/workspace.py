"""The folder that processes write records to: whose it is, what is done, what is awaited."""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from twinflow_jax import files, sharing
from twinflow_jax.data import records
from twinflow_jax.encoding.index import Key, Plan, Shard, Skipped
from twinflow_jax.errors import UserError

WORK, SETTINGS, SKIPPED = "work", "settings.json", "skipped.jsonl"


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
class Workspace(sharing.Shares):
    """folder: of the records. process, processes: which of how many this one is."""

    MADE = "records"

    @property
    def work(self) -> epath.Path:
        return self.folder / WORK

    @property
    def settings_file(self) -> epath.Path:
        return self.work / SETTINGS

    @property
    def finished(self) -> bool:
        return (self.folder / records.RECORD).exists()

    @contextlib.contextmanager
    def claim(self, settings: dict[str, Any]) -> Iterator[bool]:
        """As of `Shares`; gives whether the records are finished already."""
        if self.finished:
            report = records.open_records(self.folder).report
            self.compare(settings, report.get("settings", {}))
            if self.process == 0 and self.work.exists():  # it was killed after the last file
                self.work.rmtree()
            yield True
            return
        with super().claim(settings):
            yield False

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


def nothing_in(skipped: dict[Key, Skipped]) -> UserError:
    """Says why nothing of a source can be used."""
    first = [skipped[key] for key in sorted(skipped)[:3]]
    return UserError(
        f"none of the {len(skipped)} items of the source can be used: "
        + "; ".join(f"{one.id} {one.reason} ({one.detail})" for one in first)
    )

"""Scores of one run's suites in one table, beside the paper's and its teacher's."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from twinflow_jax.errors import UserError
from twinflow_jax.evaluation.suites import SUITES, paper
from twinflow_jax.evaluation.suites.results import SCORES

DIVERSITY = ".diversity.json"
ONE_RUN = ("weights", "nfe", "seed", "size")  # of which a table is
LIKE = ("suite", "prompts", "rewritten")  # in which a run and its teacher have to be alike


@dataclasses.dataclass(frozen=True)
class Row:
    """metric: what the numbers are of. interval: of the run's; decimals: that are printed. found,
    expected: results. judge: of all the numbers. mark: of notes that belong to it."""

    metric: str
    run: float
    paper: float | None = None
    teacher: float | None = None
    interval: tuple[float, float] | None = None
    found: int | None = None
    expected: int | None = None
    judge: str = ""
    decimals: int = 3
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """heads: of the three columns of numbers."""

    heads: tuple[str, str, str]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def cells(self) -> list[list[str]]:
        """With the heads, as text."""
        lines = [["", *self.heads, "results", "judge"]]
        for row in self.rows:
            number = lambda value, r=row: "-" if value is None else f"{value:.{r.decimals}f}"
            run = number(row.run) + row.mark
            if row.interval:
                run += f" [{number(row.interval[0])}, {number(row.interval[1])}]"
            count = f"{row.found:,} of {row.expected:,}" if row.expected else ""
            lines.append(
                [row.metric, run, number(row.paper), number(row.teacher), count, row.judge]
            )
        return lines

    def text(self) -> str:
        """For the terminal."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        return "\n".join([*lines, *self.notes])

    def markdown(self) -> str:
        head, *rows = (f"| {' | '.join(line)} |" for line in self.cells())
        rule = "|" + "---|" * len(self.cells()[0])
        return "\n".join([head, rule, *rows, "", *(f"- {note}" for note in self.notes), ""])

    def json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def table(folders: Sequence[str], teachers: Sequence[str] = ()) -> Table:
    """Of what was read of these folders. teachers: folders of the same suites that the base model
    drew, in place of the paper's teacher.

    Raises:
      UserError: nothing was read there, the folders are of several runs, or a teacher's scores are
        of other prompts or by another judge.
    """
    found = [kept for folder in folders for kept in opened(folder)]
    bases = {kept["metric"]: kept for folder in teachers for kept in opened(folder)}
    manifest = found[0]["manifest"]
    for kept in found:
        for key in ONE_RUN:
            if kept["manifest"].get(key) != manifest.get(key):
                raise UserError(
                    f"the folders are of several runs: {key} is {manifest.get(key)} and "
                    f"{kept['manifest'].get(key)}; give those of one"
                )
    metrics = [kept["metric"] for kept in found]
    if len(set(metrics)) < len(metrics):
        raise UserError(f"two folders are of one suite ({', '.join(metrics)}): give one of each")
    nfe, sizes = manifest["nfe"], (manifest["parameters"], manifest["adapters"])
    edits = SUITES[manifest["suite"]].edits
    usual = paper.row_of(*sizes, nfe, edits=edits)
    theirs = None if manifest.get("base") else usual  # the paper has no row of a base's few steps
    teacher = paper.teacher_of(manifest["parameters"], edits)
    rows: list[Row] = []
    size = "x".join(map(str, manifest["size"] or ())) or "each picture's own size"
    notes = [f"This run: {manifest['checkpoint']}, {nfe} NFE, "
             f"{size}, seed {manifest['seed']}; intervals hold the "
             "score in 95 % of as many prompts drawn again"]
    for kept in found:
        base = bases.get(kept["metric"])
        if base:
            check_alike(kept, base)
        dagger = bool(kept["manifest"]["rewritten"])
        of_row = paper.row_of(*sizes, nfe, True) if dagger else theirs
        of_teacher = None if dagger else teacher
        if kept["judge"] != kept["usual_judge"]:
            of_row = of_teacher = None
            notes.append(f"{kept['title']}: judged by {kept['judge']}, not by "
                         f"{kept['usual_judge']} as in the paper: no comparison")
        rows += _rows(kept, base, of_row, of_teacher, "†" if dagger else "")
        notes += [f"{kept['title']}: {note}" for note in _notes(kept, dagger)]
    heads = (
        "this run", theirs.name if theirs else "paper",
        "teacher" if bases else teacher.name if teacher else "teacher",
    )
    return Table(heads, tuple(rows), tuple(notes))


def opened(folder: str) -> list[dict[str, Any]]:
    """The scores that were read of a folder.

    Raises:
      UserError: none were.
    """
    place, found = epath.Path(folder), []
    for ending in (SCORES, DIVERSITY):
        file = place.parent / (place.name + ending)
        try:
            found += [json.loads(file.read_text())] if file.exists() else []
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: make it again") from error
    if not found:
        raise UserError(f"there are no scores of {folder}: `evaluate suite read` it first")
    return found


def check_alike(run: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """Raises UserError where two scores cannot stand beside each other."""
    for key in LIKE:
        if run["manifest"][key] != teacher["manifest"][key]:
            raise UserError(f"{run['title']}: the teacher's {key} are others: read alike folders")
    if run["judge"] != teacher["judge"]:
        raise UserError(f"{run['title']} is judged by {run['judge']}, the teacher's by "
                        f"{teacher['judge']}: two judges give no comparison")


def _rows(kept, base, of_row, of_teacher, mark: str) -> list[Row]:
    """The score's, then its groups' and further ones."""
    lookup = lambda row, key: row.scores.get(key) if row else None
    name, decimals = kept["metric"], 2 if kept["scale"] > 1 else 3
    theirs = lambda value, key: value if base else lookup(of_teacher, key)
    rows = [Row(
        kept["title"], kept["score"], lookup(of_row, name),
        theirs(base and base["score"], name), tuple(kept["interval"]), kept["found"],
        kept["expected"], kept["judge"], decimals, mark,
    )]
    for group, value in kept["groups"].items():
        key = f"{name}: {group}"
        rows.append(Row(
            f"  {group}", value, lookup(of_row, key),
            theirs(base and base["groups"].get(group), key), decimals=decimals,
        ))
    for further, value in kept["further"].items():
        key = f"{name}: {further}"
        rows.append(Row(
            f"  {further}", value, lookup(of_row, key),
            theirs(base and base["further"].get(further), key), decimals=decimals,
        ))
    return rows


def _notes(kept, dagger: bool) -> list[str]:
    manifest, notes = kept["manifest"], list(kept["notes"])
    if dagger:
        notes.append("† rewritten prompts were drawn: not to be compared with the others")
    if not manifest["published"]:
        notes.append("prompts that are not the published ones")
    if kept["found"] < kept["expected"]:
        missing = kept["expected"] - kept["found"]
        notes.append(f"{missing:,} of {kept['expected']:,} results are missing")
    if manifest.get("cut"):
        notes.append(f"{manifest['cut']:,} prompts were cut: too long for the text encoder")
    return notes


def kept_scores(
    scores: Mapping[str, Any], manifest: Mapping[str, Any], judge: str | None
) -> dict[str, Any]:
    """Scores of a suite with what the table needs beside them. judge: who judged, where it was not
    the suite's own."""
    suite = SUITES[manifest["suite"]]
    return {
        "metric": suite.name, "title": suite.title, "scale": suite.scale,
        "usual_judge": suite.judge, "manifest": dict(manifest), **scores,
    } | ({"judge": judge} if judge else {})

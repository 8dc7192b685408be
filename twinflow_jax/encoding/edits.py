"""Sources of edits: an instruction, the pictures that it is about, and the picture that it makes.

As people's sets have them: JSON lines or one JSON list, Parquet, folders with equal names.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from twinflow_jax import files
from twinflow_jax.data.tables import opened
from twinflow_jax.encoding.archives import Parquet
from twinflow_jax.encoding.beside import Beside, Folder, stem_of
from twinflow_jax.encoding.sources import (
    UNREADABLE,
    Item,
    Lines,
    clean,
    cut,
    digest,
    fields,
    labelled,
)
from twinflow_jax.errors import UserError

TARGET, SOURCES = "target", ("source", "control")  # folders with equal names
NO_SOURCE = "no source"


@dataclasses.dataclass(frozen=True)
class Columns:
    """What holds the instructions, the sources and the target. SOURCE stands for SOURCE_0,
    SOURCE_1 ... too."""

    instruction: str
    source: str
    target: str

    def sources(self, found: Iterable[str]) -> list[str]:
        """Those of the columns found that hold sources, in their order."""
        numbered = re.compile(re.escape(self.source) + r"(?:_(\d+))?")
        matches = filter(None, map(numbered.fullmatch, found))
        return [match[0] for match in sorted(matches, key=lambda match: int(match[1] or 0))]


SETS = (  # by their own fields
    Columns("instruction", "source", "target"),
    Columns("input_prompt", "input_image", "output_image"),  # ShareGPT-4o-Image
    Columns("prompt", "input_images", "output_images"),  # ImgEdit
    Columns("edited_prompt_list", "src_img", "edited_img"),  # OmniEdit-Filtered-1.2M
    Columns("text", "local_input_image", "output_image"),  # pico-banana-400k
    Columns("instruction", "source_img", "target_img"),  # MagicBrush
    Columns("edit_prompt", "original_image", "edited_image"),  # InstructPix2Pix
    Columns("caption", "control_path", "image_path"),  # musubi-tuner
    Columns("prompt", "edit_image", "image"),  # DiffSynth
)
Given = tuple[str | None, str | None, str | None]


def columns_of(found: Sequence[str], given: Given, where) -> Columns:
    """The first of SETS that is all there, with the columns that were given in place of its own.

    Raises:
      UserError: there is none.
    """
    for usual in SETS:
        one = Columns(*(g or u for g, u in zip(given, dataclasses.astuple(usual), strict=True)))
        if one.instruction in found and one.target in found and one.sources(found):
            return one
    raise UserError(
        f"{where} has no edits that are known; it has {', '.join(found) or 'nothing'}: name what "
        "has the instructions, the sources and the results with --caption-column, "
        "--source-column and --image-column"
    )


def several(value: Any) -> list:
    """One or several pictures as a list."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def with_sources(item: Item, sources: Sequence[Any], most: int) -> Item:
    """An item that has those, or why it cannot. most: that an edit may be of."""
    if item.problem or 1 <= len(sources) <= most:
        return dataclasses.replace(item, sources=tuple(sources))
    detail = f"it is of {len(sources)} pictures, this network takes {most} at most"
    return Item(item.id, problem=(UNREADABLE, detail) if sources else (NO_SOURCE, "it has none"))


def edit_of(
    name: str, row: dict[str, Any], columns: Columns, most: int, place: Callable[..., Any],
    where: str = "",
) -> Item:
    """The edit in a row of a table. place: (column, number there, value) -> a picture's place;
    raises ValueError where it can be none."""
    found = {
        column: several(row.get(column)) for column in (columns.target, *columns.sources(row))
    }
    if len(found[columns.target]) != 1:
        what = f"{where}{columns.target} is not one picture"
        return Item(name, problem=(UNREADABLE, what))
    try:
        target, *sources = (
            place(column, number, value)
            for column, values in found.items() for number, value in enumerate(values)
        )
    except ValueError as error:
        return Item(name, problem=(UNREADABLE, f"{where}{error}"))
    item = labelled(name, row.get(columns.instruction), target, where)
    return with_sources(item, sources, most)


def path_of(column: str, number: int, value: Any) -> str:
    if not files.inside(value):
        raise ValueError(f"{column} names no file within the folder: {clean(str(value))[:200]}")
    return value


class EditLines(Lines):
    """JSON lines, or one JSON list of such objects; pictures lie in the file's folder."""

    def __init__(self, file: epath.Path, chunk: int, given: Given, most: int):
        self.file, self.name, self.pictures, self._most = file, file.name, True, most
        data = file.read_bytes()
        lines = files.text_lines(data, "surrogateescape")
        if file.suffix.lower() == ".json":
            try:
                rows = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file} is no JSON ({error}): write a list of objects") from error
            lines = list(enumerate(map(json.dumps, rows if isinstance(rows, list) else ()), 1))
        if not lines:
            raise UserError(f"{file} is empty: write one JSON object for each edit")
        found = fields(files.parsed(line) for _, line in lines)
        self._columns = columns_of(found, given, file)
        self._digest = digest(data, repr(self._columns))
        self.chunks = cut(lines, chunk)

    def items(self, chunk) -> Iterator[Item]:
        for number, line in chunk:
            row, where = files.parsed(line), f"{self.name} line {number}, "
            given = row.get("id")
            name = clean(given) if isinstance(given, str) else f"{self.name}:{number}"
            if row:
                yield edit_of(name, row, self._columns, self._most, path_of, where)
            else:
                yield Item(name, problem=(UNREADABLE, f"{where}no JSON object"))


class EditTables(Parquet):
    """Parquet files; pictures are bytes in them, or paths from their folder."""

    def __init__(self, tables: Sequence[epath.Path], name: str, given: Given, most: int):
        with opened(tables[0]) as table:
            found = columns_of(table.schema_arrow.names, given, tables[0])
        self._edits, self._most = found, most
        super().__init__(tables, name, True, found.target, found.instruction)
        for file, columns in zip(self.files, self._columns, strict=True):
            with opened(file) as table:
                columns[1] += found.sources(table.schema_arrow.names)

    def _item(self, name: str, place: list, captions: dict[str, Any]) -> Item:
        number, group, row = place
        try:
            with self._lock:
                pictures = self._rows(number, group, 1)[row]
        except OSError as error:
            if error.errno:
                raise
            return Item(name, problem=(UNREADABLE, error.strerror))
        here = lambda column, k, value: [*place, column, k]
        return edit_of(name, captions | pictures, self._edits, self._most, here)

    def read(self, place) -> bytes:
        number, group, row, column, k = place
        with self._lock:
            value = several(self._rows(number, group, 1)[row][column])[k]
        value = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
        if isinstance(value, bytes):
            return value
        if not files.inside(value):
            raise OSError(0, f"column {column!r} holds neither bytes nor a path within the folder")
        return (self.files[number].parent / value).read_bytes()


class EditFolders(Folder):
    """FOLDER/target with pictures and captions beside them; FOLDER/source, source_2 ... with the
    pictures that they were made from, of equal names or with _0, _1 ... after them."""

    def __init__(self, folder: epath.Path, names: Sequence[str], chunk: int, most: int):
        is_source = re.compile(rf"({'|'.join(SOURCES)})(_\d+)?")
        self._folders = sorted({n.partition("/")[0] for n in names if "/" in n})
        self._folders = list(filter(is_source.fullmatch, self._folders))
        self._by_stem, self._most = {stem_of(name): name for name in names}, most
        targets = [name for name in names if name.startswith(f"{TARGET}/")]
        if not self._folders or not targets:
            raise UserError(
                f"{folder} holds no edits: give a folder with {TARGET}/ and {SOURCES[0]}/ in it, "
                ".parquet files, or a file of JSON lines"
            )
        super().__init__(folder, targets, True, chunk)

    def _sources(self, row: Beside) -> list[str]:
        stem = stem_of(row.picture or "").partition("/")[2]
        ends = ("", *(f"_{number}" for number in range(self._most + 1)))
        wanted = (f"{folder}/{stem}{end}" for folder in self._folders for end in ends)
        return [self._by_stem[name] for name in wanted if name in self._by_stem]

    def _item(self, row: Beside) -> Item:
        return with_sources(super()._item(row), self._sources(row), self._most)

    def fingerprint(self) -> str:
        return digest(super().fingerprint(), *(" ".join(self._sources(row)) for row in self._rows))

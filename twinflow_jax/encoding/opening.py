"""Which source a path or a name is."""

import re
import warnings
from collections.abc import Sequence

from etils import epath

from twinflow_jax.encoding.archives import TARS, Parquet, Tars, Tfds
from twinflow_jax.encoding.beside import Folder, visible
from twinflow_jax.encoding.edits import EditFolders, EditLines, EditTables
from twinflow_jax.encoding.sources import SUFFIXES, Lines, Prompts, Source, suffix_of
from twinflow_jax.errors import UserError

OTHERS = (*SUFFIXES, ".jsonl", ".ndjson", ".csv", ".zip")
LISTS = ("metadata.jsonl", "metadata.csv")  # of pictures, in Hugging Face's ImageFolder


def open_source(
    name: str, pictures: bool, chunk: int, image: str | None, caption: str | None
) -> Source:
    """The source that a path or name is.

    pictures: whether those it has are wanted. chunk: items in a part. image, caption: what holds
    them, where it is not the usual name.
    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = epath.Path(name)
    try:
        if path.is_dir():
            return of_folder(path, pictures, chunk, image, caption)
        if path.exists():
            return of_file(path, pictures, chunk, image, caption)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or error})") from error
    match = re.fullmatch(r"(.+?)(?::([\w\[\]:%+]+))?", name)
    dataset, split = match[1], match[2] or ""
    if not epath.Path(dataset).is_dir() and not re.fullmatch(r"\w+(/[\w.]+)*", dataset):
        raise UserError(f"{name} does not exist: give a folder, a file or the name of a dataset")
    return Tfds(dataset, split, pictures, chunk, image, caption)


def open_edits(
    name: str, chunk: int, most: int, columns: tuple[str | None, str | None, str | None]
) -> Source:
    """The source of edits that a path is. most: pictures that an edit may be of. columns: that hold
    the instructions, the sources and the results, where their names are not known.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = epath.Path(name)
    try:
        if path.is_dir():
            tables = sorted(entry for entry in path.iterdir() if entry.name.endswith(".parquet"))
            if tables:
                return EditTables(tables, path.name, columns, most)
            refuse_columns(path, *columns)
            return EditFolders(path, sorted(visible(path)), chunk, most)
        if path.suffix.lower() == ".parquet" and path.exists():
            return EditTables([path], path.name, columns, most)
        if path.suffix.lower() in (".jsonl", ".ndjson", ".json") and path.exists():
            return EditLines(path, chunk, columns, most)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or error})") from error
    raise UserError(
        f"{name} holds no edits: give .jsonl, .json or .parquet, or a folder with target/ and "
        "source/ in it"
    )


def of_folder(folder, pictures: bool, chunk: int, image, caption):
    """A folder's source.

    Raises:
      UserError: it has none or two, or another path leads to it.
    """
    entries = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if "dataset_info.json" in entries:
        return Tfds(str(folder), "", pictures, chunk, image, caption)
    entries = without_descriptions(entries)
    tables, tars = ending(entries, ".parquet"), ending(entries, *TARS)
    if tables and tars:
        raise UserError(
            f"{folder} holds {tables[0]} and {tars[0]}: give a folder of either kind, or a file"
        )
    if tables or tars:
        warn_of_others(folder, entries, tables + tars)
    if tables:
        paths = [folder / name for name in tables]
        return Parquet(paths, folder.name, pictures, image, caption)
    refuse_columns(folder, image, caption)
    if tars:
        return Tars([folder / name for name in tars], folder.name, pictures)
    names = without_descriptions(sorted(visible(folder)))
    others = ending(names, ".parquet", *TARS)
    for name in [n for n in names if n.rpartition("/")[2] in LISTS] + others:
        place = folder / name
        way = f"give {place.parent if name in others else place}"
        if name.endswith(".csv"):
            way = f"write it as JSON lines, and give {place.with_suffix('.jsonl')}"
        raise UserError(f"{folder} holds {name}: {way}, or move it away")
    return Folder(folder, names, pictures, chunk)


def ending(names: Sequence[str], *suffixes: str) -> list[str]:
    return [name for name in names if name.lower().endswith(suffixes)]


def without_descriptions(names: Sequence[str]) -> list[str]:
    """Names without what img2dataset writes beside a shard: a table without pictures, figures.

    A shard is a tar, or a folder.
    """
    known = {*names, *(name.rpartition("/")[0] for name in names)}
    tables = ending(names, ".parquet")
    about = {name for name in tables if name.removesuffix(".parquet") + ".tar" in known}
    for figures in ending(names, "_stats.json"):
        shard = figures.removesuffix("_stats.json")
        if not known.isdisjoint((shard, f"{shard}.tar")):
            about |= {figures, f"{shard}.parquet"}
    return [name for name in names if name not in about]


def warn_of_others(folder, entries: Sequence[str], read: Sequence[str]) -> None:
    """Says which pictures, archives, lists and folders are not read beside those that are."""
    others = [
        name for name in entries
        if name not in read
        and (ending([name], *OTHERS) or (not suffix_of(name) and (folder / name).is_dir()))
    ]
    if others:
        warnings.warn(
            f"of {folder} only {read[0]} and its like are read; {len(others)} others are left out, "
            f"as {others[0]}", stacklevel=2,
        )


def of_file(file, pictures: bool, chunk: int, image, caption):
    kind = file.suffix.lower()
    if kind == ".parquet":
        return Parquet([file], file.name, pictures, image, caption)
    if kind in (".jsonl", ".ndjson"):
        return Lines(file, pictures, chunk, image, caption)
    refuse_columns(file, image, caption)
    if file.name.lower().endswith(TARS):
        return Tars([file], file.name, pictures)
    if kind == ".txt":
        return Prompts(file, chunk)
    raise UserError(
        f"{file} is of no kind that can be read: give .jsonl, .parquet, .tar or .txt, or a folder"
    )


def refuse_columns(path, *columns: str | None) -> None:
    """Raises UserError where columns were named of something that has none."""
    if any(columns):
        raise UserError(
            f"{path} has no columns: leave --image-column and --caption-column out"
            + (", and --source-column" if len(columns) > 2 else "")
        )

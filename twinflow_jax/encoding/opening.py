"""Which source a path or a name is."""

import re
import warnings
from collections.abc import Sequence

from etils import epath

from twinflow_jax.encoding.archives import TARS, Parquet, Tars, Tfds
from twinflow_jax.encoding.sources import SUFFIXES, Folder, Lines, Prompts, Source, visible
from twinflow_jax.errors import UserError

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


def of_folder(folder, pictures: bool, chunk: int, image, caption):
    """A folder's source.

    Raises:
      UserError: it has none or two, or another path leads to it.
    """
    names = sorted(visible(folder))
    if "dataset_info.json" in names:
        return Tfds(str(folder), "", pictures, chunk, image, caption)
    about = descriptions(names)
    names = [name for name in names if name not in about]
    ending = lambda *suffixes: [name for name in names if name.lower().endswith(suffixes)]
    here = lambda found: [name for name in found if "/" not in name]
    tables, tars = ending(".parquet"), ending(*TARS)
    taken = here(tables) + here(tars)
    paths = [folder / name for name in taken]
    if here(tables) and here(tars):
        raise UserError(
            f"{folder} holds {here(tables)[0]} and {here(tars)[0]}: give a folder of either kind, "
            "or a file"
        )
    left = set(ending(*SUFFIXES, ".parquet", *TARS, ".jsonl", ".ndjson", ".zip")) - set(taken)
    if taken and left:
        warnings.warn(
            f"of {folder} only {taken[0]} and its like are read: {len(left)} other files are left "
            f"out, as {min(left)}", stacklevel=2,
        )
    if here(tables):
        return Parquet(paths, folder.name, pictures, image, caption)
    refuse_columns(folder, image, caption)
    if taken:
        return Tars(paths, folder.name, pictures)
    lists = [name for name in names if name.rpartition("/")[2] in LISTS]
    for name in (*lists, *tables, *tars):
        place = folder / name
        way = f"give {place if name in lists else place.parent}"
        if name.endswith(".csv"):
            way = f"write it as JSON lines, and give {place.with_suffix('.jsonl')}"
        raise UserError(f"{folder} holds {name}: {way}, or move it away")
    return Folder(folder, names, pictures, chunk)


def descriptions(names: Sequence[str]) -> set[str]:
    """What img2dataset writes beside a shard: a table without pictures, and figures.

    A shard is a tar, or a folder.
    """
    known, folders = set(names), {name.rpartition("/")[0] for name in names}
    found = {name for name in names if name.removesuffix(".parquet") + ".tar" in known}
    for name in names:
        shard = name.removesuffix("_stats.json")
        if shard != name and (f"{shard}.tar" in known or shard in folders):
            found |= {name, f"{shard}.parquet"}
    return found


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


def refuse_columns(path, image: str | None, caption: str | None) -> None:
    """Raises UserError where columns were named of something that has none."""
    if image or caption:
        raise UserError(f"{path} has no columns: leave --image-column and --caption-column out")

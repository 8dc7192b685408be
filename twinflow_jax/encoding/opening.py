"""Which source a path or a name is."""

import re

from etils import epath

from twinflow_jax.encoding.archives import Parquet, Tars, Tfds
from twinflow_jax.encoding.sources import Folder, Lines, Prompts, Source
from twinflow_jax.errors import UserError


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
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    files = lambda suffix: [folder / name for name in names if name.endswith(suffix)]
    if "dataset_info.json" in names:
        return Tfds(str(folder), "", pictures, chunk, image, caption)
    if files(".parquet"):
        return Parquet(files(".parquet"), folder.name, pictures, image, caption)
    refuse_columns(folder, image, caption)
    if files(".tar"):
        return Tars(files(".tar"), folder.name, pictures)
    return Folder(folder, pictures, chunk)


def of_file(file, pictures: bool, chunk: int, image, caption):
    if file.suffix == ".parquet":
        return Parquet([file], file.name, pictures, image, caption)
    if file.suffix in (".jsonl", ".ndjson"):
        return Lines(file, pictures, chunk, image, caption)
    refuse_columns(file, image, caption)
    if file.suffix == ".tar":
        return Tars([file], file.name, pictures)
    if file.suffix == ".txt":
        return Prompts(file, chunk)
    raise UserError(
        f"{file} is of no kind that can be read: give .jsonl, .parquet, .tar or .txt, or a folder"
    )


def refuse_columns(path, image: str | None, caption: str | None) -> None:
    """Raises UserError where columns were named of something that has none."""
    if image or caption:
        raise UserError(f"{path} has no columns: leave --image-column and --caption-column out")

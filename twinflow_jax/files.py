"""Whole files and folders or none: local or object-storage paths through etils.epath."""

import contextlib
import os
import shutil

from etils import epath

from twinflow_jax.errors import UserError

UNFINISHED = "UNFINISHED"  # a file that is in a folder for as long as the folder is written


def write(path: epath.PathLike, data: bytes) -> None:
    """Writes a file so that it appears complete or not at all; makes its folder."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(target: epath.PathLike, needed: int):
    """A new folder to write into: removed again whatever stops the writing.

    A process that is killed leaves the file UNFINISHED in it, and the next one starts over.

    needed: bytes that will be written.
    Raises:
      UserError: the folder holds something, there is no room, or writing failed.
    """
    target = epath.Path(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: choose another folder")
    if target.exists() and any(target.iterdir()):
        if not (target / UNFINISHED).exists():
            raise UserError(f"{target} is not empty: choose another folder, or remove it first")
        target.rmtree()
    if "://" not in str(target):
        parent = next(p for p in target.resolve().parents if p.exists())
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise UserError(
                f"{target} takes {needed / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB free"
            )
    try:
        write(target / UNFINISHED, b"")
        yield
        (target / UNFINISHED).unlink()
    except BaseException as error:
        if target.exists():
            target.rmtree()
        if isinstance(error, OSError):
            raise UserError(f"{target} could not be written ({error.strerror or error})") from error
        raise

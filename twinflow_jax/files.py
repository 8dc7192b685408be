"""Whole files and folders or none: local or object-storage paths through etils.epath."""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from typing import Any

from etils import epath

from twinflow_jax import buckets, holders
from twinflow_jax.errors import UserError

LONGEST = 255  # bytes of a file's name
UNFINISHED = "UNFINISHED"  # a file that is in a folder for as long as the folder is written


def path(text: str) -> str:
    """A path that a user gave, as an argument or in a config, with `~` expanded.

    Shells leave it alone in `--workdir=~/runs`; `$HOME` they expand everywhere.
    Raises:
      UserError: it has a line break or a name that no file has, or is an address of a kind that
        is not known.
    """
    if "\n" in text or "\r" in text or "\0" in text:
        raise UserError(f"the path {text!r} has a line break or a NUL: rename it")
    if re.match(r"(?!gs:)\w+://", text):
        raise UserError(f"{text} is no path: give a local one, or gs://BUCKET/FOLDER")
    expanded = str(epath.Path(text).expanduser()) if text.startswith("~") else text
    if expanded.startswith("~"):
        raise UserError(f"{text} names a user that there is not: give another path, or ./{text}")
    if max(map(len, os.fsencode(expanded).split(b"/"))) > LONGEST:
        raise UserError(
            f"the path {expanded} has a name of over {LONGEST} bytes: choose a shorter one"
        )
    return expanded


def cache() -> epath.Path:
    """$TWINFLOW_CACHE, or the user's cache folder."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "twinflow_jax")
    return epath.Path(path(os.environ.get("TWINFLOW_CACHE", default)))


def write(path: epath.PathLike, data: bytes, through: epath.Path | None = None) -> None:
    """Writes a file so that it appears complete or not at all; makes its folder. through: as of
    `whole_file`."""
    if buckets.is_remote(path):
        epath.Path(path).write_bytes(data)
        return
    with whole_file(path, through) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def whole_file(path: epath.PathLike, through: epath.Path | None = None):
    """A hidden name to write to, in a file's folder, which is made; the file appears at the end,
    complete, or not at all. In a bucket it is the file's own: an object appears when it is closed.

    through: a folder of the same file system that has the hidden name instead, where a kill must
    leave nothing beside the file.
    """
    path = epath.Path(path)
    if buckets.is_remote(path):
        try:
            yield path
        except BaseException:  # closed too early
            path.unlink(missing_ok=True)
            raise
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cut, since names have a longest length. No process's id: another machine's may have it too.
    temporary = (through or path.parent) / f".{path.name[:40]}.{secrets.token_hex(4)}"
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(flag: str, place: str):
    """Reports what goes wrong with the file or folder of an argument."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {place} cannot be written: {error.strerror or error}") from error


def check_folder(flag: str, folder: str) -> None:
    """Refuses a folder that cannot be written to, before there is something to write.

    Raises:
      UserError: it is a file, or lies where nothing can be written; names the flag.
    """
    if not folder:
        raise UserError(f"{flag} is empty: name a folder")
    with writing(flag, folder):
        path = epath.Path(folder)
        if path.exists() and not path.is_dir():
            raise UserError(f"{flag} {folder} is a file: choose a folder")
        if buckets.is_remote(path):
            probe = path / f".{secrets.token_hex(8)}"
            probe.write_text("")
            probe.unlink()
            return
        # lexists: what is below a file or a folder that may not be read is not there.
        there = next(p for p in (path.resolve(), *path.resolve().parents) if os.path.lexists(p))
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UserError(
                f"{flag} {folder} cannot be written to: {there} takes no files; choose another"
            )


def text_lines(data: bytes, errors: str = "strict") -> list[tuple[int, str]]:
    """(number, text) of each line of a text in UTF-8 that is not blank.

    Byte order marks and blanks around a line are no part of it. errors: as bytes.decode has them.
    Raises:
      UnicodeDecodeError: it is not UTF-8.
    """
    lines = re.split(r"\r\n|\r|\n", data.decode("utf-8", errors))
    stripped = ((number, line.lstrip("\ufeff").strip()) for number, line in enumerate(lines, 1))
    return [(number, line) for number, line in stripped if line]


def rows(path: epath.PathLike) -> list[dict]:
    """What a file of JSON lines holds, but for lines that a kill tore; nothing where there is
    none."""
    path, found = epath.Path(path), []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def parsed(line: str) -> dict[str, Any]:
    """The JSON object of a line, {} where there is none."""
    try:
        row = json.loads(line.encode())  # what was not UTF-8 cannot be encoded
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def inside(place: Any) -> bool:
    """Whether a path from a file stays in the folder that it is relative to."""
    if not isinstance(place, str) or not place or "\0" in place or "://" in place:
        return False
    parts = place.replace("\\", "/").split("/")
    return not place.startswith(("/", "\\", "~")) and ".." not in parts


def is_full(error: BaseException | None) -> bool:
    """Whether a disk without room is behind an error, which tensorstore says in words only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    while error is not None:
        words = any(os.strerror(number) in str(error) for number in full)
        if words or getattr(error, "errno", None) in full:
            return True
        error = error.__cause__
    return False


def is_plain(name: str) -> bool:
    """Whether a relative path is NAME or FOLDER/NAME of visible files, and nothing else."""
    return bool(re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name))


@contextlib.contextmanager
def whole_folder(target: epath.PathLike, needed: int):
    """A new folder to write into: removed again whatever stops the writing.

    A process that is killed leaves the file UNFINISHED in it, and the next one starts over.

    needed: bytes that will be written.
    Raises:
      UserError: the folder holds something, another process writes to it, there is no room, or
        writing failed.
    """
    target = epath.Path(target)
    mark = target / UNFINISHED
    try:
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} is a file: choose another folder")
        if target.exists() and any(target.iterdir()) and not mark.exists():
            raise UserError(f"{target} is not empty: choose another folder, or remove it first")
        with holders.held(mark, target, keep=True):
            try:
                _clear(target)
                check_room(target, needed)
                yield
                if not buckets.is_remote(target):
                    os.sync()  # a machine that is switched off now finds it whole, or marked
            except BaseException:
                with contextlib.suppress(OSError):  # what is left is still marked
                    _clear(target)
                    mark.unlink()
                    target.rmdir()  # a mount point or a link to a folder stays, empty
                raise
    except OSError as error:
        raise UserError(f"{target} could not be written ({error.strerror or error})") from error


def _clear(folder: epath.Path) -> None:
    """Removes all of an unfinished folder but its mark."""
    for entry in folder.iterdir():
        if entry.name == UNFINISHED:
            continue
        if entry.is_dir():
            entry.rmtree()
        else:
            entry.unlink()


def check_room(target: epath.PathLike, needed: int) -> None:
    """Raises UserError where a local disk has less room than that many bytes."""
    if buckets.is_remote(target):
        return
    parent = next(p for p in epath.Path(target).resolve().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{target} takes {needed / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB free"
        )

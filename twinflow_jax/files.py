"""Whole files or none: local or object-storage paths through etils.epath."""

import os

from etils import epath


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

"""What features.json of a TFDS dataset may name.

TFDS imports the module of every class there, whichever it is: one that lies in the folder of a
downloaded dataset, below the current folder, would run.
"""

import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from twinflow_jax.errors import UserError

CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # the last one in older files
OWN = "tensorflow_datasets."


def check(folder: epath.PathLike) -> None:
    """Refuses a dataset whose features are not TFDS's own.

    Raises:
      UserError: names one that is not, or says that the file cannot be read.
    """
    file = epath.Path(folder) / "features.json"
    try:
        named = list(classes(json.loads(file.read_text())))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{folder} is no TFDS dataset: features.json: {reason}") from error
    foreign = [name for name in named if not name.startswith(OWN)]
    if foreign:
        raise UserError(
            f"{file} names the feature {foreign[0]!r}, which is not TFDS's own, and whose code is "
            "not run"
        )


def classes(tree: Any) -> Iterator[str]:
    """The classes that a features.json names, also in JSON within its strings."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in CLASS_KEYS and isinstance(value, str):
                yield value
            else:
                yield from classes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from classes(value)
    elif isinstance(tree, str) and tree.lstrip()[:1] in ("{", "["):
        yield from classes(json.loads(tree))

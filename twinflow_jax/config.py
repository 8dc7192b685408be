"""Config files, overrides from the command line, and the record that a run keeps of them.

A config file is Python with `get_config()`, perhaps taking a variant: `configs/x.py:tiny` calls
`get_config("tiny")`. Overrides are `--config.a.b=value`. Keys are locked and typed: a misspelled
key is refused with the nearest name, and so is a value of another type.
"""

import ast
import difflib
import importlib.util
import inspect
import json
import pathlib
import traceback
from collections.abc import Sequence
from typing import Any

import ml_collections

from twinflow_jax import files
from twinflow_jax.errors import UserError, reason

PATHS = {"pipeline", "data.records", "train.init_from"}  # keys that name folders


def load(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config of a file, with overrides like "train.steps=100" applied, locked.

    Raises:
      UserError: no such file, not a config file, unknown variant, key or type.
    """
    name, _, variant = path.rpartition(":")  # a folder's name may have a colon
    if not name or pathlib.Path(path).is_file():
        name, variant = path, ""
    file = pathlib.Path(name)
    if not file.is_file():
        raise UserError(f"no config file {name!r}; the ones that come along are in configs/")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None:
        raise UserError(f"{name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{name} has no get_config(), so it is not a config file")
        takes_variant = bool(inspect.signature(module.get_config).parameters)
        if variant and not takes_variant:
            raise UserError(f"{name} has no variants, but {variant!r} was asked for")
        config = module.get_config(variant) if variant else module.get_config()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{name} line {error.lineno} is not valid Python: {error.msg}") from error
    except Exception as error:  # the file is the user's, and its mistakes are too
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(file)), "?")
        kind = type(error).__name__
        raise UserError(f"{name} line {line}: {kind}: {reason(error)}") from error
    return override(config, overrides)


def overrides(arguments: Sequence[str]) -> list[str]:
    """`["KEY=VALUE"]` of a command line's `--config.KEY=VALUE`.

    Raises:
      UserError: an argument is something else.
    """
    for flag in arguments:
        if not flag.startswith("--config."):
            raise UserError(f"unknown argument {flag!r}; config keys are --config.KEY=VALUE")
    return [flag.removeprefix("--config.") for flag in arguments]


def override(
    config: ml_collections.ConfigDict, overrides: Sequence[str]
) -> ml_collections.ConfigDict:
    """A locked copy of a config with "key.path=value" overrides applied."""
    config = ml_collections.ConfigDict(config.to_dict()).unlock()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"override {text!r} has no value; write --config.{key}=VALUE")
        section, parts = config, key.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(section, ml_collections.ConfigDict) or part not in section:
                raise UserError(f"no config key {key!r}" + _nearest(config, key))
            if depth < len(parts) - 1:
                section = section[part]
        section[parts[-1]] = parse(key, value, section[parts[-1]])
    for key in PATHS & (flat := flatten(config.to_dict())).keys():
        value = flat[key]
        path = files.path(value) if isinstance(value, str) else tuple(map(files.path, value))
        config.update_from_flattened_dict({key: path})
    return config.lock()


def parse(key: str, text: str, present: Any) -> Any:
    """The value that `text` means, of the same type as the key's present value."""
    if isinstance(present, ml_collections.ConfigDict):
        raise UserError(f"config key {key!r} is a section; set one of {', '.join(present)}")
    if isinstance(present, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(present, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(present, tuple | list) and isinstance(value, tuple | list):
        kind = str if present and isinstance(present[0], str) else int | float
        some = value or kind is str  # no prompts is a choice, no numbers are none
        if not present or (some and all(isinstance(v, kind) for v in value)):
            floats = present and all(isinstance(v, float) for v in present)
            return tuple(float(v) for v in value) if floats else tuple(value)
        what = "texts" if kind is str else "numbers"
        raise UserError(f"config key {key!r} takes {what} like {present!r}, not {text!r}")
    if type(value) is not type(present):
        raise UserError(
            f"config key {key!r} takes {type(present).__name__} (now {present!r}), not {text!r}"
        )
    return value


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a.b": value}` of nested dicts."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_json(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2, default=list)


def from_json(text: str) -> ml_collections.ConfigDict:
    """The config of a run's record; nothing in it is executed."""

    def tuples(value):
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    return ml_collections.ConfigDict(tuples(json.loads(text))).lock()


def _nearest(config: ml_collections.ConfigDict, key: str) -> str:
    known = list(flatten(config.to_dict()))
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:  # perhaps the right name in the wrong section
        leaf = key.rsplit(".", 1)[-1]
        leaves = {name.rsplit(".", 1)[-1]: name for name in known}
        close = [leaves[n] for n in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.5)]
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"

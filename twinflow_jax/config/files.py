"""Config files, overrides from the command line, and the record that a run keeps of them.

A config file is Python with `get_config()`, perhaps taking a variant: `configs/x.py:tiny` calls
`get_config("tiny")`. Overrides are `--config.a.b=value`, and `--config.objective=meanflow` is that
preset in place of the file's objective. A misspelled key is refused with the nearest name, and so
is a value of another type.
"""

import ast
import importlib.util
import inspect
import json
import pathlib
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import ml_collections

from twinflow_jax import keys, objectives
from twinflow_jax.config.run import Run, keys_of, parts
from twinflow_jax.errors import UserError, noted, reason, tell
from twinflow_jax.keys import nearest

PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def parse(path: str, overrides: Sequence[str] = ()) -> Run:
    """The run that a config file describes, with overrides like "train.steps=100" applied.

    Raises:
      UserError: no such file, not a config file, an unknown variant or key, or values that no run
        can have.
    """
    fields = overridden(load(path).to_dict(), overrides)
    try:
        return Run.of(fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def load(path: str) -> ml_collections.ConfigDict:
    """What a config file gives, locked; for other config files to start from.

    Raises:
      UserError: no such file, not a config file, or an unknown variant.
    """
    name, _, variant = path.rpartition(":")  # a folder's name may have a colon
    if not name or pathlib.Path(path).is_file():
        name, variant = path, ""
    file = _find(name)
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
        if not isinstance(config, ml_collections.ConfigDict):
            raise UserError(f"{name}: get_config() gives no ConfigDict; start from defaults.get()")
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{name} line {error.lineno} is not valid Python: {error.msg}") from error
    except Exception as error:  # the file is the user's, and its mistakes are too
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(file)), "?")
        kind = type(error).__name__
        raise UserError(f"{name} line {line}: {kind}: {reason(error)}") from error
    return config.lock()


def _find(name: str) -> pathlib.Path:
    """The file of a path, or of the name of a config that comes along: `mnist`, `configs/mnist.py`.

    Raises:
      UserError: there is none.
    """
    file = pathlib.Path(name)
    if file.is_file():
        return file
    # Beside the package in a clone, inside it where it was installed.
    coming = {file.stem: file for folder in (PACKAGE.parent / "configs", PACKAGE / "configs")
              for file in folder.glob("*.py")}
    if file.suffix in ("", ".py") and file.stem in coming and file.parent.name in ("", "configs"):
        return coming[file.stem]
    raise UserError(f"no config file {name!r}; those that come along: {', '.join(sorted(coming))}")


def overridden(fields: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Nested fields with "section.key=value" overrides applied, first those that say which keys
    there are: "objective=preset", and the kinds of an objective and of a network.

    Raises:
      UserError: no such key or preset, or a value of another type.
    """
    preset, kinds = "objective=", ("model.name=", "objective.form=")
    order = lambda text: (not text.startswith(preset), not text.startswith(kinds))
    problems = []
    for text in sorted(overrides, key=order):
        name, equals, value = text.partition("=")
        if not equals:
            problems.append(f"override {text!r} has no value; write --config.{name}=VALUE")
            continue
        section, _, leaf = name.rpartition(".")
        with noted(problems):
            if text.startswith(preset):
                fields = fields | {"objective": objectives.preset(value)}
                continue
            changed = {leaf: value_of(name, value, fields)}
            if section:
                changed = {section: fields.get(section, {}) | changed}
            fields = fields | changed
            if text.startswith(kinds):
                fields = _left(fields, section)
    tell(problems)
    return fields


def _left(fields: dict[str, Any], section: str) -> dict[str, Any]:
    """The fields without keys of a section that belong to another family or form.

    A warning names them.
    """
    known = keys.keys_of(parts(fields)[section])
    gone = [f"{section}.{name}" for name in fields[section] if name not in known]
    if gone:
        warnings.warn(
            f"{section} is of another kind than the config file's: its {', '.join(gone)} "
            f"{'is' if len(gone) == 1 else 'are'} left out",
            stacklevel=2,
        )
    return fields | {section: {k: v for k, v in fields[section].items() if k in known}}


def value_of(name: str, text: str, fields: dict[str, Any]) -> Any:
    """The value that a text means for a key of the run of these fields."""
    known = keys_of(fields)
    if name in parts(fields):
        mine = ", ".join(key for key in known if key.startswith(f"{name}."))
        raise UserError(f"config key {name!r} is a section; set one of {mine}")
    if name not in known:
        raise UserError(f"no config key {name!r}" + nearest(known, name))
    if known[name].kind is str:
        return text
    try:
        return known[name].fit(ast.literal_eval(text))
    except UserError as error:
        raise UserError(f"config key {name!r}: {error}") from error
    except (ValueError, SyntaxError, TypeError) as error:
        if known[name].kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        present = flatten(fields).get(name, known[name].default)
        raise UserError(
            f"config key {name!r} takes {known[name].type} (now {present!r}), not {text!r}"
        ) from error


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a.b": value}` of nested dicts."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_json(run: Run) -> str:
    return json.dumps(run.fields(), indent=2)

"""Keys of a run's description: default, type, meaning and bounds of each stand in one place.

A part of the description (`train`, `optimizer`, a network's fields ...) is a frozen dataclass that
derives from Part, whose fields are made by `option`. It checks itself when it is made.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from twinflow_jax import files
from twinflow_jax.errors import UserError, noted, tell

WORDS = {int: "int", float: "float", str: "str", bool: "bool"}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a value, or each value of a tuple, may be: least <= value <= most,
    above < value < below, or one of choices."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        """In words; "" where there are none."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is None:
            return ""
        if high is None:
            return f"more than {low}" if self.least is None else f"{low} or more"
        opening = "(" if self.least is None else "["
        closing = ")" if self.most is None else "]"
        return f"a number in {opening}{low}, {high}{closing}"

    def hold(self, value: Any) -> bool:
        """Whether a value lies within."""
        if self.choices:
            return value in self.choices
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: the type of its values, its default, what it means, and what it may be."""

    kind: Any
    default: Any
    meaning: str
    bounds: Bounds = Bounds()
    is_path: bool = False

    @property
    def type(self) -> str:
        """The type in words, such as "int", "tuple of float" or "int or tuple of int"."""
        def told(kind: Any) -> str:
            if kind in WORDS:
                return WORDS[kind]
            each, length = _elements(kind)
            return f"tuple of {'' if length is None else f'{length} '}{WORDS[each]}"

        return " or ".join(map(told, _kinds(self.kind)))

    def fit(self, value: Any) -> Any:
        """A value as this key holds it: lists become tuples, whole numbers floats where they are.

        Raises:
          TypeError: it is of another type.
        """
        kind = _kinds(self.kind)[-1 if isinstance(value, tuple | list) else 0]
        if kind in WORDS:
            value = _fit(kind, value)
            return files.path(value) if self.is_path else value
        each, length = _elements(kind)
        if not isinstance(value, tuple | list) or length not in (None, len(value)):
            raise TypeError
        found = tuple(_fit(each, one) for one in value)
        return tuple(map(files.path, found)) if self.is_path else found

    def read(self, name: str, value: Any) -> Any:
        """What `fit` gives.

        Raises:
          UserError: it is of another type, or no path; names the key.
        """
        try:
            return self.fit(value)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        except TypeError as error:
            like = f", like {self.default!r}" if self.default else ""
            raise UserError(f"{name} is {value!r}; it takes {self.type}{like}") from error

    def wanted(self, value: Any) -> str:
        """What to give instead of a value of the right type; "" where it will do."""
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(one, float) and not math.isfinite(one) for one in values):
            return "a finite number"
        if not all(map(self.bounds.hold, values)):
            return str(self.bounds)
        largest = self.bounds.most or 2**31 - 1  # JAX counts with 32 bits
        if any(isinstance(one, int) and one > largest for one in values):
            return f"{largest} or less"
        return ""

    @property
    def told(self) -> str:
        """Its meaning and bounds in words."""
        return f"{self.meaning}; {self.bounds}" if str(self.bounds) else self.meaning


def option(default: Any, meaning: str, is_path: bool = False, **bounds: Any) -> Any:
    """A field of a Part. meaning: for the person who sets it; is_path: whether it names folders,
    whose `~` is expanded; bounds: those of Bounds."""
    told = {"meaning": meaning, "bounds": Bounds(**bounds), "is_path": is_path}
    return dataclasses.field(default=default, metadata=told)


class Part:
    """A part of a run's description. section: the name that stands before its keys."""

    section: ClassVar[str]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Part":
        """The part with these values, its defaults for what is missing.

        Raises:
          UserError: a key that there is not, or a value that it cannot have.
        """
        known, fitted, problems = keys_of(cls), {}, []
        for name, value in fields.items():
            if name not in known:
                problems.append(f"{cls.section} has no key {name!r}{nearest(known, name)}")
                continue
            with noted(problems):
                fitted[name] = known[name].read(f"{cls.section}.{name}", value)
        tell(problems)
        return cls(**fitted)

    def __post_init__(self):
        """Refuses values that no key may have.

        Raises:
          UserError: names every such key with its value and what it takes.
        """
        problems = [
            f"{self.section}.{name} is {getattr(self, name)!r}; give {wanted}"
            for name, one in keys_of(type(self)).items()
            if (wanted := one.wanted(getattr(self, name)))
        ]
        tell(problems)


def keys_of(part: type) -> dict[str, Key]:
    """The keys of a Part's class by name, in order.

    A class that changes only a default says only that: meaning and bounds are its base's.
    """
    hints, found = typing.get_type_hints(part), {}
    for field in dataclasses.fields(part):
        declared = (base.__dataclass_fields__.get(field.name) for base in part.__mro__[:-1]
                    if dataclasses.is_dataclass(base))
        told = next((one.metadata for one in declared if one is not None and one.metadata), None)
        where = f"{part.__module__}.{part.__name__}.{field.name}"
        if told is None:
            raise TypeError(f"{where} has no meaning: make it with option(default, meaning)")
        kind = hints[field.name]
        if any(k not in WORDS and not isinstance(k, types.GenericAlias) for k in _kinds(kind)):
            raise TypeError(f"{where} is {kind}: a key is int, float, str, bool, a tuple of one of "
                            "them, or both, as int | tuple[int, ...]")
        found[field.name] = Key(kind, field.default, **told)
    return found


def nearest(known: Iterable[str], key: str) -> str:
    """The key that was meant instead of one that there is not, or all."""
    close = difflib.get_close_matches(key, known := list(known), n=1, cutoff=0.5)
    if not close:  # perhaps the right name in the wrong section
        leaf = key.rsplit(".", 1)[-1]
        leaves = {name.rsplit(".", 1)[-1]: name for name in known}
        close = [leaves[n] for n in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.5)]
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


def _kinds(kind: Any) -> tuple[Any, ...]:
    """What a key of this type takes: it alone, or one value, and several."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _elements(kind: Any) -> tuple[type, int | None]:
    """The type of a tuple's elements, and how many there are: None for any number."""
    each, *others = typing.get_args(kind)
    return each, None if others == [...] else 1 + len(others)


def _fit(kind: type, value: Any) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value

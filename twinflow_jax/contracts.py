"""Whether a thing is what its contract says: a Protocol's names and parameters, told by name.

Python finds a missing name when it is called, perhaps after an hour of training; tests and
registries ask here instead.
"""

import inspect
from typing import Any


def missing(thing: Any, contract: type) -> list[str]:
    """What a thing lacks of a Protocol: names that are not there, and functions called otherwise.

    thing: an object, a class or a module. An empty list where all is well.
    """
    problems = []
    for name in _names(contract):
        if not hasattr(thing, name):
            problems.append(f"has no {name}")
            continue
        wanted = inspect.getattr_static(contract, name, None)
        found = thing if name == "__call__" else getattr(thing, name)
        if inspect.isfunction(wanted) and callable(found):
            ours, theirs = _parameters(wanted), _parameters(found)
            if ours != theirs[: len(ours)] or _required(found, len(ours)):
                problems.append(f"{name} takes ({', '.join(theirs)}), not ({', '.join(ours)})")
    return problems


def _names(contract: type) -> list[str]:
    """What a Protocol declares, in order, the Protocols it derives from first."""
    names: dict[str, None] = {}
    for base in reversed(contract.__mro__[:-1]):
        if getattr(base, "_is_protocol", False):
            own = [*base.__dict__.get("__annotations__", {}), *vars(base)]
            names |= dict.fromkeys(n for n in own if not n.startswith("_") or n == "__call__")
    return list(names)


def _parameters(function: Any) -> list[str]:
    names = list(inspect.signature(function).parameters)
    return names[1:] if names[:1] == ["self"] else names


def _required(function: Any, count: int) -> list[str]:
    """Parameters beyond the first `count` that have no default."""
    found = [p for name, p in inspect.signature(function).parameters.items() if name != "self"]
    empty = inspect.Parameter.empty
    return [p.name for p in found[count:] if p.default is empty and p.kind != p.VAR_KEYWORD]

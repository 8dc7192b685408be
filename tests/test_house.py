"""Imports point one way, and the names that people may import are there."""

import ast
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "twinflow_jax"

# From what imports to what is imported. Rooms on one line know nothing of each other.
HOUSE = (
    ("verbs",), ("planning",), ("training", "encoding", "serving"), ("evaluation",), ("drawing",),
    ("sampling", "checkpoints"), ("data",), ("config",), ("parallel",), ("objectives", "models"),
    ("shared",),
)
SHARED = ("arguments", "arrays", "buckets", "cache", "contracts", "errors", "files", "holders",
    "hub", "images", "keys", "seeds", "sharing")
LEVEL = {room: level for level, rooms in enumerate(HOUSE) for room in rooms}


def room_of(module: str) -> str:
    first = module.split(".")[1]
    return first if (PACKAGE / first).is_dir() else "shared" if first in SHARED else "verbs"


def imported(file: pathlib.Path) -> set[str]:
    """The package's modules that a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "twinflow_jax":
            found |= {f"twinflow_jax.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("twinflow_jax."):
            found.add(node.module)
    return found


def modules(file: pathlib.Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


FILES = sorted(PACKAGE.rglob("*.py"))


def test_imports_point_one_way():
    wrong = []
    for file in FILES:
        mine = room_of(modules(file))
        for module in imported(file):
            theirs = room_of(module)
            if theirs != mine and LEVEL[theirs] <= LEVEL[mine] and mine != "shared":
                wrong.append(f"{modules(file)} imports {module}")
            if mine == "shared" and theirs != "shared":
                wrong.append(f"{modules(file)} imports {module}")
    assert wrong == []


@pytest.mark.parametrize("folder", ["benchmarks", "configs", "tools"])
def test_what_scripts_import_is_there(folder):
    """No test runs most of them."""
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("twinflow_jax"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    if not hasattr(module, name.name):
                        importlib.import_module(f"{node.module}.{name.name}")


@pytest.mark.parametrize("room", ["objectives", "sampling"])
def test_objectives_and_samplers_know_no_network(room):
    for file in (PACKAGE / room).rglob("*.py"):
        assert not re.search(r"(import|from) (flax|optax)", file.read_text()), file
        assert not any(room_of(module) == "models" for module in imported(file)), file


def test_the_names_that_people_may_import_are_there():
    names = re.findall(r"^\| `(twinflow_jax[\w.]+)` \|", (ROOT / "docs/api.md").read_text(), re.M)
    assert len(names) > 20
    for name in names:
        module, _, leaf = name.rpartition(".")
        assert getattr(importlib.import_module(module), leaf).__doc__, name

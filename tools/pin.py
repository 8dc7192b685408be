"""Rewrites constraints.txt from the packages installed beside this Python.

    python -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/python tools/pin.py

Exact versions, and no address: pip finds them wherever the user's pip looks.
"""

import importlib.metadata
import pathlib

TOOLS = {"pip", "setuptools", "wheel", "twinflow-jax"}


def main() -> None:
    found = {
        package.metadata["Name"].lower().replace("_", "-"): package.version.split("+")[0]
        for package in importlib.metadata.distributions()
    }
    lines = [f"{name}=={version}" for name, version in sorted(found.items()) if name not in TOOLS]
    file = pathlib.Path(__file__).resolve().parents[1] / "constraints.txt"
    file.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} packages in {file.name}")


if __name__ == "__main__":
    main()

"""The documents' Python blocks run as they stand, one after another, as in a notebook."""

import pathlib
import re

from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_python_blocks_run(tmp_path, monkeypatch):
    pages = "".join((ROOT / name).read_text() for name in ("docs/start.md", "README.md"))
    blocks = re.findall(r"```python\n(.*?)```", pages, re.DOTALL)
    assert len(blocks) == 3
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda picture: shown.append(picture.size))
    scope: dict = {}
    for block in blocks:
        block = block.replace("train.steps=500", "train.steps=4")
        block = block.replace('"runs/notebook"', repr(str(tmp_path / "run")))
        exec(compile(block, "the documents", "exec"), scope)  # noqa: S102 - our own
    assert int(scope["state"].step) == 4 and shown
    assert float(sum(scope["terms"].values())) == float(scope["loss"]) > 0

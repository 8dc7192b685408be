"""The model card of an export, and pushing both to a hub (of a server here)."""

import json
import pathlib
import shutil

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from tests.checkpoints.folders import convert
from tests.hub import TOKEN
from twinflow_jax import checkpoints, images
from twinflow_jax.checkpoints import card

LICENCE = ["license: other", "license_name: a-licence", "license_link: https://example.org/it"]


@pytest.fixture
def watched(run, tmp_path) -> pathlib.Path:
    """A run of 7 steps, with sheets and metrics of those and later ones."""
    folder = pathlib.Path(shutil.copytree(run, tmp_path / "fox"))
    for step in (5, 7, 9):
        file = folder / "samples" / f"step_{step:06d}.png"
        images.save(file, Image.new("RGB", (step, 4)), {"rows": "a fox\na | bear"})
    rows = [{"step": step, "loss": 1 / step, "samples/1_nfe/frechet": step} for step in (7, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_an_export_and_its_card_go_to_the_hub_together(hub, source, watched, tmp_path, capsys):
    head = "\n".join(["---", "tags: [x]", *LICENCE, "---", "license: of no card"])
    (source / "README.md").write_text(head)
    assert convert("import", source, tmp_path / "base") == 0
    hub.put("user/exported", {"LICENSE": b"kept", "README.md": b"an older card"})
    assert convert("export", watched, tmp_path / "out", "--pipeline", tmp_path / "base",
                   "--push", "user/exported") == 0
    folder = {file.relative_to(tmp_path / "out").as_posix(): file.read_bytes()
              for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert hub.files("user/exported") == folder | {"LICENSE": b"kept"}
    text = folder["README.md"].decode()
    found = ModelCard(text).data.to_dict()
    assert found == {
        "library_name": "diffusers", "license": "other", "license_name": "a-licence",
        "license_link": "https://example.org/it", "pipeline_tag": "text-to-image",
        "tags": ["twinflow"],
    }
    assert "from `source`, trained for 7 steps (average weights)" in text and "E1(t)" in text
    assert "| `samples/1_nfe/frechet` | 7 (step 7) |" in text and "step 9" not in text
    assert "| `train.ema_decay` | 0.9 |" in text and str(tmp_path) not in text
    assert "![Samples after step 7](samples.png)\n\nRows: a fox; a | bear." in text
    assert Image.open(tmp_path / "out" / "samples.png").size == (7, 4)
    assert f"{tmp_path / 'out'} is in hub user/exported" in capsys.readouterr().out


def test_a_push_that_is_refused_costs_no_export(hub, run, tmp_path, capsys):
    assert convert("export", run, tmp_path / "out", "--push", "you") == 2
    assert "--push is no name of a repository: give USER/NAME" in capsys.readouterr().err
    hub.put("user/run", {"config.json": b"{}", "checkpoints/1/x": b""})
    assert convert("export", run, tmp_path / "out", "--push", "user/run") == 2
    assert "hub user/run holds a run: choose another --push" in capsys.readouterr().err
    assert convert("export", run, "gs://bucket/out", "--push", "user/new") == 2
    assert "gs://bucket/out is in a bucket" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    hub.refuse = lambda method, address: 403 if "/commit/" in address else 0
    assert convert("export", run, tmp_path / "out", "--push", "user/new") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'out'} is written, but not pushed: hub user/new: this token" in error
    assert f"`hf upload user/new {tmp_path / 'out'}` sends it" in error and TOKEN not in error
    assert (tmp_path / "out" / "README.md").exists() and hub.private["user/new"]


def test_a_card_names_the_base_on_the_hub(checkpoint):
    opened = checkpoints.imported.open_imported(checkpoint)
    record = opened.record | {"source": "org/name/folder", "hub": "org/name"}
    text = card.make("x", type(opened)(opened.folder, record))["README.md"].decode()
    assert ModelCard(text).data.base_model == "org/name" and "from `org/name/folder`." in text

"""The notebooks run from top to bottom, with a small random SANA and pictures of digits."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests import sana_folder

ROOT = pathlib.Path(__file__).resolve().parents[1]
nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[test]'")
nbformat = pytest.importorskip("nbformat")


@pytest.mark.slow
@pytest.mark.parametrize("machine, exported", [
    ("kaggle", "transformer/diffusion_pytorch_model.safetensors"),
    ("colab", "pytorch_lora_weights.safetensors"),
])
def test_one_step_sana(machine, exported, hub, tmp_path):
    """Twice, as in two sessions: the second finds everything done, its run on the hub alone."""
    sana_folder.write(tmp_path)
    (tmp_path / "pictures").mkdir()
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:40], digits.target, strict=False)):
        picture = Image.fromarray((15 * image).astype(np.uint8)).resize((64, 64))
        picture.save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"the handwritten digit {label}")
    names = {name: tmp_path / name.lower() for name in ("KEPT", "SCRATCH")}
    for folder in names.values():
        folder.mkdir()
    settings = names | {
        "CODE": ROOT, "VENV": sys.prefix, "BASE": tmp_path / "pipeline", "SIZE": "64",
        "PICTURES": tmp_path / "pictures", "CONFIG": f"configs/sana06b_{machine}.py:tiny",
        "HUB": "user/sana",
    }
    notebook = nbformat.read(ROOT / "notebooks" / "one_step_sana.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    text = json.dumps({name: str(value) for name, value in settings.items()})
    first.source = first.source.replace(
        '\nos.environ["PATH"]', f'\nos.environ.update({text})\nos.environ["PATH"]'
    )
    if machine == "colab":
        first.source = f'import sys\nsys.modules["google.colab"] = sys\n{first.source}'
    for _ in range(2):
        shutil.rmtree(tmp_path / "kept" / "run", ignore_errors=True)
        nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3").execute()
    assert "comes from hub user/sana" in (tmp_path / "scratch" / "log").read_text()
    run = json.loads((tmp_path / "kept" / "run" / "config.json").read_text())
    assert run["train"]["init_from"] == str(tmp_path / "scratch" / "base")
    shown = [
        output for cell in notebook.cells for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(shown) == 2  # the last sheet of training, and what was drawn
    folder = tmp_path / "scratch" / "one_step"
    assert (folder / exported).exists()
    assert (folder / exported).read_bytes() == hub.files("user/sana-one-step")[exported]

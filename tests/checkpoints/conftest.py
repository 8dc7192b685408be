"""A published folder, its import and a run on it, which the tests of conversion share."""

import pathlib
import shutil

import pytest

from twinflow_jax import checkpoints, objectives
from twinflow_jax.checkpoints import imported, importing
from twinflow_jax.config import Run
from twinflow_jax.models import names


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A pipeline's folder, float32, one file for each network."""
    from tests import qwen_folder  # seconds to import, which other tests here do without
    from tests.checkpoints.folders import SEED

    folder = tmp_path_factory.mktemp(f"seed_{SEED}")
    print(f"seed {SEED}")
    qwen_folder.write(folder, seed=SEED)
    return folder / "pipeline"


@pytest.fixture(scope="session")
def checkpoint(base, tmp_path_factory):
    """Its import."""
    folder = tmp_path_factory.mktemp("imported") / "checkpoint"
    importing.import_folder(str(base), str(folder), progress=False)
    return folder


@pytest.fixture
def source(base, tmp_path):
    """A copy of it, to be changed."""
    return pathlib.Path(shutil.copytree(base, tmp_path / "source"))


@pytest.fixture(scope="session")
def run(checkpoint, tmp_path_factory):
    """A run's folder with trained weights: its arrays by path, the checkpoint's plus 1."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    described = Run.of(
        {
            "model": {"name": "qwen_image"}, "pipeline": str(checkpoint),
            "objective": objectives.preset("released", guidance=0.0),
            "train": {"ema_decay": 0.9, "keep": 1},
        }
    )
    arrays = imported.open_imported(checkpoint).arrays("transformer")
    values = {path: array.read().result() + 1 for path, array in arrays.items()}
    average = {path: array * 2 for path, array in values.items()}
    with checkpoints.claim(workdir, described):
        saver = checkpoints.Saver(workdir, keep=1)
        saver.save(7, {"params": names.unflatten(values), "average": names.unflatten(average)})
        saver.wait()
        saver.close()
    return workdir

"""A published folder, its import and a run on it, which the tests of conversion share."""

import pathlib
import shutil

import pytest

from twinflow_jax.checkpoints import importing


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
    from tests.checkpoints.folders import write_run

    return write_run(checkpoint, tmp_path_factory.mktemp("trained") / "run")

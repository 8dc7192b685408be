"""Pairs of noise and pictures: what `sample --pairs` writes is what DMD's regression learns."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests.test_verbs import call
from twinflow_jax import checkpoints, data, objectives, sample
from twinflow_jax.checkpoints import tensors
from twinflow_jax.config import Run
from twinflow_jax.drawing import pairs
from twinflow_jax.errors import UserError
from twinflow_jax.sampling import few_step
from twinflow_jax.sampling import sample as draw
from twinflow_jax.training import state
from twinflow_jax.training.loop import train


def dmd(run: Run, start: str, file: str) -> Run:
    """The run with DMD, from a start and pairs of its."""
    return dataclasses.replace(
        run, objective=objectives.PRESETS["dmd"],
        train=dataclasses.replace(run.train, init_from=start),
        data=dataclasses.replace(run.data, pairs=file),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture
def drawn(small_config, folder) -> tuple[str, str]:
    """A start, and a file of pairs of it."""
    start = folder / "start"
    if not start.exists():
        train(small_config("train.steps=3"), str(start), progress=False)
        flags = "--pairs", "--count", "4", "--steps", "3", "--style", "mul"
        assert call(sample, "--checkpoint", str(start), "--out", str(folder / "out"), *flags) == 0
    [file] = (folder / "out").iterdir()
    return str(start), str(file)


def test_a_picture_is_what_its_noise_becomes(drawn):
    start, file = drawn
    _, model, params, _ = checkpoints.load_weights(start)
    found = pairs.read(file)
    assert found.x.shape == (40, 8, 8, 1) and len(np.unique(found.noise)) == found.noise.size
    grid = few_step(3, style="mul", stochastic=None)
    cond, key = model.cond(found.label), jax.random.key(0)
    again = draw(model.apply, params, jnp.asarray(found.noise), cond, grid, key)
    np.testing.assert_allclose(np.clip(again, -1, 1), found.x, atol=1e-5)


def test_a_run_learns_from_pairs_and_resumes(small_config, drawn, tmp_path):
    run = lambda steps, file=drawn[1]: dmd(small_config(f"train.steps={steps}"), drawn[0], file)
    train(run(2), str(tmp_path / "pieces"), progress=False)
    ends = [
        train(run(5), str(tmp_path / name), progress=False) for name in ("pieces", "whole")
    ]
    chex.assert_trees_all_equal(*(jax.device_get(state.to_parts(end)) for end in ends))
    assert "loss/regression" in (tmp_path / "whole" / "metrics.jsonl").read_text()

    other = pairs.read(drawn[1])
    pairs.save(tmp_path / "other", dataclasses.replace(other, noise=-other.noise))
    with pytest.raises(UserError, match="holds another run .data.pairs|started on other records"):
        train(run(6, str(tmp_path / "other")), str(tmp_path / "whole"), progress=False)


@pytest.mark.parametrize(("rows", "side", "label", "message"), [
    (0, 8, 0, "holds no pairs: write one with `twinflow sample --pairs`"),
    (40, 4, 0, "sample_shape is .8, 8, 1., but data .* has images of .4, 4, 1."),
    (40, 8, 10, "pictures of class 10, but model.num_classes is 10"),
    (4, 8, 0, "data has 4 rows to train on, too few"),
])
def test_files_that_are_no_pairs_for_a_run(
    small_config, drawn, tmp_path, rows, side, label, message
):
    x, labels = np.zeros((rows, side, side, 1), np.float32), np.full(rows, label, np.int32)
    if rows:
        pairs.save(tmp_path / "file", data.Split(x, labels, x))
    else:
        tensors.save(epath.Path(tmp_path / "file"), {"x": x})
    with pytest.raises(UserError, match=message):
        train(
            dmd(small_config(), drawn[0], str(tmp_path / "file")), str(tmp_path / "run"),
            progress=False,
        )
    assert not (tmp_path / "run").exists()


def test_pairs_that_are_missing_or_not_used(small_config, drawn, tmp_path):
    start, file = drawn
    with pytest.raises(UserError, match="learns from pairs: set data.pairs"):
        dmd(small_config(), start, "")
    with pytest.raises(UserError, match="data.pairs is set, but objective 'tutorial' learns from"):
        small_config(f"data.pairs={file}")
    out = "--out", str(tmp_path / "out")
    assert call(sample, "--checkpoint", start, *out, "--pairs", "--steps", "2") != 0
    assert not (tmp_path / "out").exists()

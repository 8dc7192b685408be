"""Weights that a family never trains: no gradient, no moments, no copy of them in averages."""

import dataclasses

import jax
import numpy as np
import pytest

from twinflow_jax import checkpoints, models
from twinflow_jax.models import names
from twinflow_jax.training import state
from twinflow_jax.training.loop import train

FIXED, AVERAGED = "Dense_0/kernel", ["objective.teacher_decay=0.9", "train.ema_decay=0.9"]


@pytest.fixture(autouse=True)
def family(monkeypatch):
    fixed = dataclasses.replace(models.FAMILIES["mlp"], fixed=(r"Dense_0/kernel", r"nowhere/.*"))
    monkeypatch.setitem(models.FAMILIES, "mlp", fixed)


def arrays(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("overrides", [["train.micro_steps=2"], ["train.weights=bfloat16"]])
def test_only_the_rest_is_trained_and_resumed(small_config, tmp_path, overrides):
    config = lambda steps: small_config(f"train.steps={steps}", *AVERAGED, *overrides)
    begin = train(config(1), str(tmp_path / "one"), progress=False)
    end = train(config(10), str(tmp_path / "ten"), progress=False)
    start, last = names.flatten(begin.params), names.flatten(end.params)
    for path in start:
        assert (np.asarray(start[path]) == np.asarray(last[path])).all() == (path == FIXED), path

    shape = start[FIXED].shape
    held = (end.opt_state, end.teacher, end.average)
    assert shape not in {leaf.shape for leaf in jax.tree.leaves(held)}
    count = len(jax.tree.leaves(end.params))
    moments = [leaf for leaf in jax.tree.leaves(end.opt_state) if leaf.ndim]
    assert len(moments) == 2 * (count - 1)
    assert len(jax.tree.leaves(end.average.params)) == count - 1
    sampled = names.flatten(state.sampling_params(end))
    np.testing.assert_array_equal(sampled[FIXED], last[FIXED])
    assert len(sampled) == count

    def again() -> None:
        resumed = train(config(10), str(tmp_path / "ten"), progress=False)
        jax.tree.map(np.testing.assert_array_equal, *map(arrays, (end, resumed)))

    again()  # from the end
    (tmp_path / "ten" / "checkpoints" / "10").rename(tmp_path / "away")
    again()  # from step 5
    params = checkpoints.load_weights(tmp_path / "ten")[2]
    for path, leaf in names.flatten(params).items():
        np.testing.assert_allclose(leaf, np.asarray(sampled[path], np.float32), rtol=1e-6)

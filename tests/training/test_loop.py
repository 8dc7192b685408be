"""What the loop refuses, what stops it, and what it leaves behind."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from twinflow_jax import checkpoints, objectives
from twinflow_jax.errors import UserError
from twinflow_jax.training import state
from twinflow_jax.training.loop import train


def trained(config, workdir) -> state.TrainState:
    return train(config, str(workdir), progress=False)


def test_run_leaves_pictures_metrics_and_the_last_checkpoints(small_config, tmp_path):
    config = small_config("train.keep=2", "train.sample_every=10")
    final = trained(config, tmp_path / "run")
    assert int(final.step) == 20
    saver = checkpoints.Saver(tmp_path / "run", 2)
    assert saver.steps == [15, 20]
    saver.close()
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    terms = [value for name, value in rows[-1].items() if name.startswith("loss/")]
    assert len(terms) == 5 and sum(terms) == pytest.approx(rows[-1]["loss"], rel=1e-5)
    with Image.open(tmp_path / "run/samples/step_000020.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 10
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_micro_steps_train_the_same_weights(small_config, tmp_path):
    """Roles rotating over parts of 4 rows: the same parameters up to rounding."""
    results = []
    for micro_steps in (1, 8):
        config = small_config("train.steps=3", f"train.micro_steps={micro_steps}").unlock()
        config.objective = objectives.preset("released")
        results.append(trained(config, tmp_path / str(micro_steps)).params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), *results)


def test_starts_from_another_run(small_config, tmp_path):
    first = trained(small_config(), tmp_path / "first")
    config = small_config(
        f"train.init_from={tmp_path / 'first'}", "train.steps=1", "optimizer.learning_rate=0.0"
    )
    second = trained(config, tmp_path / "second")
    jax.tree.map(np.testing.assert_array_equal, second.params, first.average.params)

    with pytest.raises(UserError, match=r"another network.*model.width \(32\)"):
        trained(
            small_config("model.width=16", f"train.init_from={tmp_path / 'first'}"),
            tmp_path / "third",
        )


def test_nan_stops_with_step_and_term(small_config, tmp_path):
    trained(small_config("train.steps=5"), tmp_path / "run")
    config = small_config("optimizer.learning_rate=1e12")
    with pytest.raises(UserError, match=r"step \d+: loss/\w+.* became (nan|inf)"):
        trained(config, tmp_path / "nan")
    saver = checkpoints.Saver(tmp_path / "nan", 3)
    assert all(step < 5 for step in saver.steps)  # nothing with NaN was saved
    saver.close()


def test_folder_of_another_run_is_refused(small_config, tmp_path):
    trained(small_config("train.steps=1"), tmp_path / "run")
    before = (tmp_path / "run/config.json").read_bytes()
    with pytest.raises(UserError, match="another run .*model.width is 32 there, 16 here"):
        trained(small_config("train.steps=1", "model.width=16"), tmp_path / "run")
    assert (tmp_path / "run/config.json").read_bytes() == before
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty and holds no run"):
        trained(small_config(), tmp_path / "papers")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.batch_size=100000"], "too few for a batch of 100000"),
        (["data.name=cifar"], "choose from digits, mnist5k, mnist"),
        (["model.sample_shape=(28,28,1)"], r"images of \(8, 8, 1\)"),
        (["train.micro_steps=5"], "does not divide the batch of 32"),
        (["optimizer.name=sgd"], "choose from 'adamw', 'adam', 'radam'"),
        (["objective.order=-1"], "sub-steps >= 0"),
        (["objective.guidance=1.0"], "diverges"),
    ],
)
def test_impossible_values_are_refused(small_config, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        trained(small_config(*overrides), tmp_path / "run")


def test_torn_checkpoint_falls_back_loudly(small_config, tmp_path, capsys):
    config = small_config()
    expected = trained(config, tmp_path / "run")
    for file in (tmp_path / "run/checkpoints/20").rglob("*"):
        if file.is_file() and file.stat().st_size > 2000:
            file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="checkpoint 20 .* cannot be read"):
        checkpoints.load_weights(tmp_path / "run")
    again = trained(config, tmp_path / "run")
    assert "checkpoint 20" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, again.params, expected.params)


def test_no_room_for_a_checkpoint(small_config, tmp_path, monkeypatch):
    """A save that fails in the background ends the run with the reason; older ones stay."""
    trained(small_config("train.steps=5"), tmp_path / "run")
    saver = checkpoints.Saver(tmp_path / "run", 3)
    assert saver.steps == [5]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver._checkpointer, "save_checkpointables_async", full)
    five = trained(small_config("train.steps=5"), tmp_path / "copy").replace(
        step=jax.numpy.asarray(6)
    )
    with pytest.raises(UserError, match=r"step 6 could not be saved.*No space left.*\[5\]"):
        saver.save(five)
    saver.close()


def test_run_without_checkpoint_and_no_run(small_config, tmp_path):
    with pytest.raises(UserError, match="is no run"):
        checkpoints.load_weights(tmp_path)
    trained(small_config("train.steps=1"), tmp_path / "run")
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 1"):
        checkpoints.load_weights(tmp_path / "run", step=7)
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        checkpoints.load_weights(tmp_path / "run")

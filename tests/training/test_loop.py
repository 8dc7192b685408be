"""What the loop refuses, what stops it, and what it leaves behind."""

import dataclasses
import json
import os
import shutil
import types

import chex
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from twinflow_jax import checkpoints, evaluation, files, models, objectives
from twinflow_jax import config as configs
from twinflow_jax.errors import UserError
from twinflow_jax.parallel import flags
from twinflow_jax.training import checks, loop, state
from twinflow_jax.training.loop import keep_compiled, train


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
    page = (tmp_path / "run/index.html").read_text()
    assert '"step": 20' in page and '[20, "samples/step_000020.png"]' in page


def test_a_step_is_compiled_once(small_config, tmp_path, compiled):
    trained(small_config("train.steps=4"), tmp_path / "run")
    assert len(compiled) == 1


def test_several_processes_share_compiled_programs(tmp_path, monkeypatch):
    """They are kept in the run's folder, also where something has compiled before."""
    jax.jit(lambda x: x + 1)(1.0)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    least = "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", least)}
    try:
        keep_compiled(str(tmp_path))
        jax.config.update(least, 0.0)
        jax.jit(lambda x: x * 3 - 2)(1.0)
        assert list((tmp_path / "compiled").iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_micro_steps_train_the_same_weights(small_config, tmp_path):
    """Roles rotating over parts of 4 rows: the same parameters up to rounding."""
    results = []
    for micro_steps in (1, 8):
        config = small_config(
            "train.steps=3", f"train.micro_steps={micro_steps}", "train.unconditional=permuted"
        )
        config = dataclasses.replace(config, objective=objectives.PRESETS["released"])
        results.append(trained(config, tmp_path / str(micro_steps)).params)
    chex.assert_trees_all_close(*results, rtol=2e-4, atol=1e-6)


def test_starts_from_another_run(small_config, tmp_path):
    first = trained(small_config(), tmp_path / "first")
    config = small_config(
        f"train.init_from={tmp_path / 'first'}", "train.steps=1", "optimizer.learning_rate=0.0"
    )
    second = trained(config, tmp_path / "second")
    chex.assert_trees_all_equal(second.params, first.average.params)

    with pytest.raises(UserError, match=r"network \(model.width is 32 there, 16 here\): "):
        trained(
            small_config("model.width=16", f"train.init_from={tmp_path / 'first'}"),
            tmp_path / "third",
        )
    with pytest.raises(UserError, match="name is 'mlp' there, 'dit' here;.* and [0-9]+ more"):
        other = small_config(f"train.init_from={tmp_path / 'first'}")
        checks.check_start(dataclasses.replace(other, model=models.dit.Config()))
    with pytest.raises(UserError, match="nothing is no run"):
        trained(small_config(f"train.init_from={tmp_path / 'nothing'}"), tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_nan_stops_with_step_and_term(small_config, tmp_path):
    """A rate that explodes after step 5 leaves the checkpoint of step 5, readable and finite."""
    first = trained(small_config("train.steps=5"), tmp_path / "run")
    record = tmp_path / "run/config.json"
    record.write_text(configs.to_json(small_config("optimizer.learning_rate=1e12")))
    with pytest.raises(UserError, match=r"step [678]: loss/\w+.* became (nan|inf)"):
        trained(small_config("optimizer.learning_rate=1e12"), tmp_path / "run")
    _, _, raw, step = checkpoints.load_weights(tmp_path / "run", raw=True)
    assert step == 5
    chex.assert_trees_all_equal(raw, first.params)


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


def test_a_run_in_training_is_refused_and_not_touched(small_config, tmp_path):
    config = small_config("train.steps=1")
    trained(config, tmp_path / "run")
    (tmp_path / "run/checkpoints/2.orbax-checkpoint-tmp").mkdir()  # what it saves
    everything = lambda: {
        path: path.read_bytes() if path.is_file() else None
        for path in (tmp_path / "run").rglob("*")
    }
    with checkpoints.claim(tmp_path / "run", config):
        before = everything()
        with pytest.raises(UserError, match=f"run is in use by process {os.getpid()} on"):
            trained(small_config("train.steps=2"), tmp_path / "run")
        assert everything() == before
        checkpoints.load_weights(tmp_path / "run")
    trained(small_config("train.steps=2"), tmp_path / "run")


def test_a_run_goes_on_as_if_it_had_been_meant_to_be_longer(small_config, tmp_path):
    """Bit for bit, through a change of phases and pictures at its first end."""
    more = ["train.flow_matching_steps=7", "train.keep=9", "optimizer.warmup=8"]
    longer = small_config(*more, "train.steps=10")
    trained(small_config(*more, "train.steps=6"), tmp_path / "run")
    final, straight = trained(longer, tmp_path / "run"), trained(longer, tmp_path / "straight")
    jax.tree.map(np.testing.assert_array_equal, final, straight)
    assert checkpoints.read_run(tmp_path / "run").train.steps == 10
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "straight")]
    assert rows[0] == rows[1]

    record = (tmp_path / "run/config.json").read_bytes()
    with pytest.raises(UserError, match="has done 10 steps: train.steps is 8; give that many"):
        trained(small_config(*more, "train.steps=8"), tmp_path / "run")
    assert (tmp_path / "run/config.json").read_bytes() == record


def test_a_rate_that_ends_somewhere_fixes_the_number_of_steps(small_config, tmp_path):
    falls = "optimizer.decay_to=0.1"
    trained(small_config(falls, "train.steps=2"), tmp_path / "run")
    for steps in (1, 4):
        said = f"decay_to=0.1: for {steps},.* Give train.steps=2, or start from"
        with pytest.raises(UserError, match=said):
            trained(small_config(falls, f"train.steps={steps}"), tmp_path / "run")


def test_an_option_that_this_compiler_has_not_is_said(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(flags, "options", lambda kind: {"xla_no_such_thing": "true"})
    with pytest.raises(UserError, match="does not know the option xla_no_such_thing.*libtpu"):
        train(small_config(), str(tmp_path), progress=False)


def test_what_does_not_fit_in_memory_says_what_helps(small_config, tmp_path, monkeypatch):
    def start(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(loop, "start", start)
    with pytest.raises(UserError, match="does not fit the devices' memory: .*plan.*remat=full"):
        trained(small_config(), tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.batch_size=100000"], "too few for a batch of 100000"),
        (["data.name=cifar"], "choose from digits, mnist5k, mnist"),
        (["model.sample_shape=(28,28,1)"], r"images of \(8, 8, 1\)"),
        (["train.micro_steps=5"], "does not divide the batch of 32"),
        (["optimizer.name=sgd"], "give one of adamw, adam, radam"),
        (["objective.order=-1"], "objective.order is -1; give 1 or more"),
        (["objective.guidance=1.0"], "diverges"),
        (["objective.guidance=0.5"], "which nothing trains here"),
        (["objective.guidance=0.5", "model.num_classes=0"], "but model.num_classes is 0"),
        (["objective.teacher_decay=1.0"], "random weights"),
        (["train.keep=0"], "train.keep is 0; give 1 or more"),
        (["train.micro_steps=0"], "train.micro_steps is 0"),
        (["train.ema_decay=1.0"], r"give a number in \[0, 1\)"),
        (["optimizer.betas=(0.9,)"], "takes tuple of 2 float"),
        (["sample.steps=(0,)"], r"give a number in \[1, 1000\]"),
        (["sample.steps=()"], "give evaluations"),
    ],
)
def test_impossible_values_are_refused(small_config, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        trained(small_config(*overrides), tmp_path / "run")


def test_phases_differ_in_terms_and_their_means_are_written(small_config, tmp_path):
    """An interval of the log that holds flow-matching steps and others, and a resume between."""
    config = small_config("train.flow_matching_steps=3", "train.log_every=5", "train.steps=10")
    whole = trained(config, tmp_path / "run")
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert {"loss/multi_step", "loss/rcgm", "loss/rectify"} <= row.keys()
    shutil.rmtree(tmp_path / "run/checkpoints/10")
    chex.assert_trees_all_equal(trained(config, tmp_path / "run").params, whole.params)


def test_condition_dropout_trains_the_empty_condition(small_config, tmp_path):
    """The embedding of "no class" moves only where rows lose their class."""
    moved = {}
    for dropout in (0.0, 0.5):
        config = small_config("train.steps=2", f"train.condition_dropout={dropout}")
        params = trained(config, tmp_path / str(dropout)).params
        moved[dropout] = params["Condition_0"]["Embed_0"]["embedding"]
    assert np.abs(moved[0.5][10] - moved[0.0][10]).max() > 1e-4


def test_finished_run_draws_a_picture_that_a_kill_kept_from_it(small_config, tmp_path, capsys):
    config = small_config("train.steps=3")
    trained(config, tmp_path / "run")
    picture = tmp_path / "run/samples/step_000003.png"
    (tmp_path / "run/index.html").unlink()
    picture.unlink()
    trained(config, tmp_path / "run")
    assert picture.name in (tmp_path / "run/index.html").read_text()
    assert picture.exists() and "is complete: step 3 of 3" in capsys.readouterr().out


def test_pictures_come_before_their_judge_and_a_kill_between_loses_no_scores(
    small_config, tmp_path, monkeypatch
):
    """The first sheet need not wait for a classifier to be trained."""
    config, made = small_config("train.steps=3", "sample.score_count=20"), []
    picture, metrics = (tmp_path / "run" / name for name in (
        "samples/step_000003.png", "metrics.jsonl"
    ))

    def create(dataset):
        made.append(picture.exists())
        if len(made) == 1:
            raise KeyboardInterrupt
        return types.SimpleNamespace(score=lambda x, labels: dict.fromkeys(
            ("accuracy", "frechet", "diversity"), float(len(x))
        ))

    monkeypatch.setattr(evaluation.ClassJudge, "create", create)
    with pytest.raises(KeyboardInterrupt):
        trained(config, tmp_path / "run")
    assert made == [True] and "samples/" not in metrics.read_text()
    for _ in range(2):
        trained(config, tmp_path / "run")
        rows = [row for row in files.rows(metrics) if "samples/1_nfe/frechet" in row]
        assert [(row["step"], row["samples/1_nfe/frechet"]) for row in rows] == [(3, 20.0)]
    assert made == [True, True]


def test_reader_leaves_a_save_in_progress_alone(small_config, tmp_path):
    trained(small_config("train.steps=1"), tmp_path / "run")
    saving = tmp_path / "run/checkpoints/2.orbax-checkpoint-tmp"
    saving.mkdir()
    checkpoints.load_weights(tmp_path / "run")
    assert saving.exists()


def test_no_readable_checkpoint_never_starts_over(small_config, tmp_path):
    config = small_config("train.steps=5")
    trained(config, tmp_path / "run")
    for file in (tmp_path / "run/checkpoints/5").rglob("*"):
        if file.is_file() and file.stat().st_size > 2000:
            file.write_bytes(b"")
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint in .* can be read"):
            trained(config, tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics


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
    chex.assert_trees_all_equal(again.params, expected.params)


def test_no_room_for_a_checkpoint(small_config, tmp_path, monkeypatch):
    """A save that fails in the background ends the run with the reason; older ones stay."""
    trained(small_config("train.steps=5"), tmp_path / "run")
    saver = checkpoints.Saver(tmp_path / "run", 3)
    assert saver.steps == [5]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver._checkpointer, "save_checkpointables_async", full)
    with pytest.raises(UserError, match=r"step 6 could not be saved.*No space left.*\[5\]"):
        saver.save(6, {"params": {"w": jax.numpy.zeros(3)}})
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

"""Training a text-to-image family, with its small random networks."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from tests.models.oracles import QUICK
from twinflow_jax import checkpoints, objectives
from twinflow_jax import config as configs
from twinflow_jax.checkpoints import exporting, imported, random
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.training import checks, records, setup
from twinflow_jax.training.loop import train

TINY = "configs/qwen20b_tpu.py:tiny"
FEW = (
    "train.steps=4", "train.sample_every=4", "train.checkpoint_every=3", "sample.columns=1",
    "sample.steps=(1,)", "model.remat=none",
)


def tiny(*overrides: str):
    return configs.parse(TINY, [*FEW, *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run that made its own pipeline."""
    folder = tmp_path_factory.mktemp("text") / "run"
    train(tiny(), str(folder), progress=False)
    return folder


def test_a_run_draws_its_prompts_and_logs_every_role(run):
    with Image.open(run / "samples/step_000004.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 50
        assert "red fox" in picture.text["rows"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {f"loss/{role}" for role in ("one_step", "adversarial", "rectify")} <= last.keys()


def test_the_null_prompt_is_encoded_once(run):
    [file] = (run / "random").glob("null_prompt_*.safetensors")
    before = file.stat().st_mtime_ns
    train(tiny("sample.columns=2"), str(run), progress=False)
    assert file.stat().st_mtime_ns == before


def test_every_leaf_of_the_transformer_is_trained(run):
    """From step 3 on: before it, what was initialised to zero holds gradients back."""
    _, before, _ = checkpoints.open_weights(run, raw=True, step=3)
    _, after, _ = checkpoints.open_weights(run, raw=True, step=4)
    assert after.keys() == imported.open_imported(run / "random").arrays("transformer").keys()
    still = [
        path for path, array in after.items()
        if np.array_equal(array.read().result(), before[path].read().result())
    ]
    assert still == []


def test_weights_come_from_and_go_back_to_a_published_folder(run, tmp_path):
    """Nothing learnt: the export's transformer is the imported one, bit for bit."""
    source = random.write_random("qwen_image", tmp_path / "pipeline", seed=5)
    still = tiny(
        f"pipeline={tmp_path / 'pipeline'}", f"train.init_from={tmp_path / 'pipeline'}",
        "optimizer.learning_rate=0.0", "train.steps=1",
    )
    still = dataclasses.replace(still, objective=objectives.PRESETS["flow_matching"])
    final = train(still, str(tmp_path / "run"), progress=False)
    for path, leaf in names.flatten(final.params).items():
        np.testing.assert_array_equal(leaf, source.arrays("transformer")[path].read().result())
    _, arrays, _ = checkpoints.open_weights(tmp_path / "run", raw=True)
    exporting.export_folder(source, tmp_path / "export", trained=arrays, progress=False)
    found = exporting.compare(str(tmp_path / "export"), source, progress=False)
    assert found.keys() == {"transformer", "text_encoder", "vae"}
    for name, result in found.items():
        assert result.identical > 20 and not result.lines, (name, result.lines)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pipeline=",), "set pipeline to an imported checkpoint"),
        (("pipeline=nowhere",), "no imported checkpoint"),
        (("model.layers=3",), "another transformer than model .model.layers is 2 there"),
        (("model.zero_cond_t=True",), "zero_cond_t is False there, True here"),  # no weight says it
        (("model.remat=some",), "remat is 'some'"),
        (("train.condition_dropout=0.0",), "nothing trains here"),
        (("data.text_tokens=0",), "data.text_tokens is 0"),
        (("data.text_tokens=8,64",), "only data.records go by the lengths of their captions"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tiny(*overrides), str(tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_sees_r_otherwise_is_no_start(run, tmp_path):
    source = run / "random"
    other = tiny(f"train.init_from={source}", "model.time_conditioning=gated")
    says = "trained with model.time_conditioning 'second_embedder', here it is 'gated'"
    with pytest.raises(UserError, match=says):
        train(other, str(tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()
    record = json.loads((source / "checkpoint.json").read_text())
    table = tiny().family.text_to_image.networks["transformer"].table(tiny().model)
    record["networks"]["transformer"]["added"] = sorted(table.group(names.KNOWS_R))
    base = tmp_path / "base"
    base.mkdir()
    (base / "checkpoint.json").write_text(json.dumps(record))
    checks.check_start(tiny(f"train.init_from={base}", "model.time_conditioning=gated"))
    with pytest.raises(UserError, match="is another network .model.zero_cond_t is False there"):
        checks.check_start(tiny(f"train.init_from={base}", "model.zero_cond_t=True"))


def test_a_step_does_not_depend_on_the_padding_of_texts():
    """Of random weights, with 64 places for texts of at most 16 tokens and with 16."""
    made = tiny(
        "data.batch_size=8", "model.dtype=float32", "model.layers=1", "train.flow_matching_steps=1",
        "train.condition_dropout=0.3",
    )
    prepared, rng = setup.prepare(made), np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    weights = jax.tree.map(lambda a: 0.1 * normal(*a.shape), prepared.model.abstract_params())
    x, null, *texts = normal(8, *made.model.sample_shape), *(
        normal(length, made.model.text_width) for length in (4, 16, 3, 9, 16, 5, 1, 12, 7)
    )
    found = []
    for places in (64, 16):
        shape = dataclasses.replace(made.shape, text=places)
        cond, none = (records.padded(each, made.model, places) for each in (texts, [null]))
        step = prepared.lower("flow_matching", shape).compile(QUICK)
        state = prepared.started()(weights)
        found.append(step(state, {"x": x, "cond": cond, "null": none})[1])
    assert found[0]["loss"] > 0.1 and found[0]["gradient_norm"] > 0.1
    chex.assert_trees_all_close(*found, rtol=2e-5)


def test_a_record_of_before_is_read(run, tmp_path):
    """Of when a network had a second embedder or none."""
    fields = json.loads((run / "config.json").read_text())
    del fields["model"]["time_conditioning"]
    fields["model"]["second_embedder"] = True
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert checkpoints.read_run(tmp_path) == checkpoints.read_run(run)


def test_the_published_variants_name_the_published_network():
    for variant, batch in (("paper", 32), ("released", 32), ("bench", 128)):
        run = configs.parse(f"configs/qwen20b_tpu.py:{variant}")
        assert run.data.batch_size == batch and run.model.remat == "full"
    with pytest.raises(UserError, match="no variant 'huge'"):
        configs.load("configs/qwen20b_tpu.py:huge")


def test_what_kaggle_keeps_has_room_for_two_checkpoints():
    run = configs.parse("configs/sana06b_kaggle.py")
    state = setup.prepare(run).abstract_state()
    assert run.train.keep == 1
    assert 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) < 15e9

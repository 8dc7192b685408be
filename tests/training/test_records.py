"""Training from records: sizes, captions and mixtures of folders, on one process and on several."""

import dataclasses
import itertools
import json

import chex
import jax
import numpy as np
import pytest
from etils import epath

from tests.planning.test_rehearsal import rehearse
from twinflow_jax import checkpoints, data, objectives
from twinflow_jax import config as configs
from twinflow_jax.checkpoints import random
from twinflow_jax.config.files import overridden
from twinflow_jax.data import records
from twinflow_jax.drawing import Pipeline, text
from twinflow_jax.errors import UserError
from twinflow_jax.training import checks, inputs, loop, setup
from twinflow_jax.training import records as training_records
from twinflow_jax.training.loop import Interrupted, train

CAPTIONS = [("a cat", "a small cat"), ("the sea",), ("one red apple", "an apple", "fruit")]
SIZES = {"16x8": 9, "8x16": 20, "8x8": 3}  # width x height: records
FIELDS = (
    "data.batch_size=8", "data.text_tokens=16", "train.steps=6", "train.log_every=1",
    "train.checkpoint_every=3", "train.sample_every=6", "train.condition_dropout=0.1",
    "train.init_from=", "sample.steps=(1,)", "sample.columns=1", "sample.prompts=()",
    "optimizer.warmup=0",
)
MODEL = {
    "name": "minilm_dit", "sample_shape": (8, 8, 3), "patch": 4, "width": 32, "depth": 1,
    "heads": 2, "text_width": 48,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "minilm"
    return Pipeline(
        random.write_random("minilm_dit", folder, seed=0), "float32", progress=False
    )


@pytest.fixture(scope="module")
def write(pipeline, tmp_path_factory):
    """A function that writes records: (name, {split: count}, other fields) -> folder."""
    checkpoint = pipeline.checkpoint
    embedded = [text.embed(pipeline, captions, 16) for captions in CAPTIONS]

    def make(name: str, splits: dict[str, int], **fields):
        folder = tmp_path_factory.mktemp("records") / name
        folder.mkdir()
        channels = 0 if records.PROMPTS in splits else 3
        manifest = records.Manifest(**{
            "family": "minilm_dit", "text_encoder": checkpoint.identity("text_encoder"),
            "text_width": 48, "autoencoder": "", "channels": channels, "downscale": 1, **fields,
        })
        shards, rng = {}, np.random.default_rng(1)
        for split, count in splits.items():
            examples = []
            for row in range(count):
                mine = embedded[row % 3]
                sample = None
                if channels:
                    width, height = map(int, split.split("x"))
                    sample = np.full((height, width, 3), row / 100) + rng.uniform(
                        -0.1, 0.1, (height, width, 3)
                    )
                tokens = [t[m] for t, m in zip(mine.tokens, mine.mask, strict=True)]
                examples.append(records.Example(
                    f"{name}/{split}/{row}", CAPTIONS[row % 3], tokens, sample, (50, 60),
                    noise=np.full(sample.shape, row / 8) if manifest.pairs else None,
                ))
            path = records.shard_file(folder, split, 0, 1)
            shards[split] = [(count, records.write_shard(path, examples, manifest))]
        text.null(pipeline).save(folder / records.NULL, [""])
        records.finish(folder, manifest, shards, {})
        return folder

    return make


@pytest.fixture
def config(pipeline):
    """A function of records and overrides giving a config."""
    def make(*overrides: str, variant: str = "", file: str = "emoji", **data):
        fields = configs.load(f"configs/{file}.py{variant}").to_dict()
        fields |= {"model": fields["model"] | MODEL}
        fields["data"] |= data
        changes = [*FIELDS, f"pipeline={pipeline.checkpoint.folder}", *overrides]
        return configs.Run.of(overridden(fields, changes))

    return make


def write_again(folder: str):
    """As if the records had been made again, of something else."""
    file = epath.Path(folder) / records.RECORD
    file.write_text(json.dumps(json.loads(file.read_text()) | {"settings": "others"}))


def test_rows_are_what_was_written(write, config):
    folder = write("a", SIZES)
    made = config(records=(str(folder),))
    settings = made.model
    opened = training_records.open_folders(made.data.records, settings, image_free=False)
    found = training_records.streams(opened, (), settings, (16,))
    assert [one.sample for one in found] == [(8, 8, 3), (8, 16, 3), (16, 8, 3)]
    streams = list(found.values())
    assert [stream.count for [stream] in streams] == [3, 9, 20]
    picked = set()
    for epoch in range(20):
        batch = streams[0][0].read(np.array([2, 0]), np.array([[7, epoch, 0, 2], [7, epoch, 0, 0]]))
        assert batch["x"].shape == (2, 8, 8, 3)
        np.testing.assert_allclose(batch["x"][0], 0.02, atol=0.11)
        lengths = batch["cond"]["mask"].sum(1)
        example = opened[0].read("8x8", 2)
        [which] = [k for k, t in enumerate(example.tokens) if len(t) == lengths[0]][:1]
        np.testing.assert_array_equal(
            batch["cond"]["tokens"][0, : lengths[0]], example.tokens[which]
        )
        assert not batch["cond"]["tokens"][0, lengths[0] :].any()
        picked.add(which)
    assert picked == {0, 1, 2}


def test_pairs_are_what_was_written_and_train(write, config, tmp_path):
    """DMD's regression takes the noise that stands beside a picture; prompts alone have none."""
    start = config(records=(str(write("start", {"8x8": 16})),))
    train(start, str(tmp_path / "start"), progress=False)
    folders = {
        "pairs": write("pairs", {"8x8": 16}, pairs=True), "none": write("none", {"8x8": 16}),
        "prompts": write("prompts", {records.PROMPTS: 16}),
    }

    def learning(name: str, **fields):
        return dataclasses.replace(
            config(records=(str(folders[name]),), **fields), objective=objectives.PRESETS["dmd"],
            train=dataclasses.replace(start.train, init_from=str(tmp_path / "start"), steps=2),
        )

    run = learning("pairs")
    source = inputs.open_data(run)
    [[stream]] = inputs.prepare(run, source, tmp_path / "pairs").streams
    rows = np.array([5, 2])
    batch = stream.read(rows, np.zeros((2, 4), np.uint64))
    np.testing.assert_array_equal(batch["noise"], np.full((2, 8, 8, 3), 1) * [[[[5]]], [[[2]]]] / 8)
    np.testing.assert_allclose(batch["x"], rows[:, None, None, None] / 100 + np.zeros((8, 8, 3)),
                               atol=0.11)
    train(run, str(tmp_path / "pairs"), progress=False)
    assert "loss/regression" in (tmp_path / "pairs" / "metrics.jsonl").read_text()
    for name, message in (("none", "keeps no noise beside"), ("prompts", "without pictures")):
        with pytest.raises(UserError, match=message):
            train(learning(name), str(tmp_path / name), progress=False)
        assert not (tmp_path / name).exists()
    with pytest.raises(UserError, match="set data.records to what `twinflow encode --generate --p"):
        dataclasses.replace(run, data=dataclasses.replace(run.data, records=(), name="digits"))
    with pytest.raises(UserError, match="data.pairs is of classes, but model 'minilm_dit' draws"):
        dataclasses.replace(run, data=dataclasses.replace(run.data, pairs="file"))


def bucketed(folder, config, lengths: tuple[int, ...]):
    """The folder's records, and the streams of each shape with these lengths of text."""
    made = config(records=(str(folder),))
    [opened] = training_records.open_folders(made.data.records, made.model, image_free=False)
    return opened, training_records.streams([opened], (), made.model, lengths)


def test_a_row_goes_with_the_least_text_that_holds_its_captions(write, config):
    """Longest captions of 11, 8 and 13 tokens: each record once an epoch, none of its tokens
    gone, whatever the host; what fits no length is cut as ever."""
    opened, found = bucketed(write("a", {"8x8": 24}), config, (8, 11, 16))
    assert [(one.sample, one.text) for one in found] == [((8, 8, 3), n) for n in (8, 11, 16)]
    make = lambda **given: data.batches(tuple(found.values()), 4, seed=3, **given)
    epoch, shapes, seen = list(itertools.islice(make(), 6)), list(found), []
    for shape, batch in epoch:
        for x, tokens, mask in zip(batch["x"], *batch["cond"].values(), strict=True):
            [row] = [row for row in range(24) if np.array_equal(opened.read("8x8", row).sample, x)]
            assert len(tokens) == shapes[shape].text == (11, 8, 16)[row % 3]
            [same] = [t for t in opened.read("8x8", row).tokens if len(t) == mask.sum()]
            np.testing.assert_array_equal(tokens[: len(same)], same)
            assert mask[: len(same)].all() and not tokens[len(same) :].any()
            seen.append(row)
    assert sorted(seen) == list(range(24))
    for host in range(2):  # begun at the third batch, each with its rows of it
        mine = slice(host, None, 2)
        theirs = make(start=2, rows=np.arange(4)[mine])
        for (shape, whole), (same, part) in zip(epoch[2:], theirs, strict=False):
            assert shape == same
            chex.assert_trees_all_equal(jax.tree.map(lambda a: a[mine], whole), part)  # noqa: B023
    cut = bucketed(opened.folder, config, (8, 11))[1]
    assert [stream.count for [stream] in cut.values()] == [8, 16]


def test_a_stopped_run_ends_as_an_undisturbed_one(
    write, config, tmp_path, monkeypatch, compiled, lowered
):
    """Two sizes of pictures, two lengths of text and two folders by weight: each shape's step is
    compiled once, and rehearsed."""
    folders = str(write("a", {"8x8": 30})), str(write("b", {"16x8": 1, "8x8": 3}))
    made = config("data.text_tokens=8,16", records=folders, weights=(1.0, 3.0))
    found = lowered(train, made, str(tmp_path / "whole"), progress=False)
    assert sum("@jit_step" in one.as_text() for one in compiled) == 3
    assert sum("jit(step)" in one for one in found) == 3
    assert found - lowered(rehearse, made, "train") == set()
    whole = checkpoints.load_weights(tmp_path / "whole", raw=True)[2]
    stops = iter([0, 0, 0, 15])  # SIGTERM after the fourth step
    monkeypatch.setattr(
        "twinflow_jax.parallel.hosts.stop_requested", lambda *_: next(stops, 0)
    )
    with pytest.raises(Interrupted):
        train(made, str(tmp_path / "parts"), progress=False)
    monkeypatch.undo()
    again = train(made, str(tmp_path / "parts"), progress=False)
    chex.assert_trees_all_equal(whole, again.params)
    write_again(folders[1])
    with pytest.raises(UserError, match="started on other records"):
        train(made, str(tmp_path / "parts"), progress=False)
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 6
    assert (tmp_path / "whole/samples/step_000006.png").exists()
    wait = json.loads((tmp_path / "whole/speed.jsonl").read_text().splitlines()[-1])["data_wait"]
    assert 0 <= wait <= 1


def test_captions_alone_train_without_pictures(write, config, tmp_path):
    pictures = config("train.steps=2", variant=":flow", records=(str(write("a", {"8x8": 20})),))
    train(pictures, str(tmp_path / "flow"), progress=False)
    prompts = write("p", {records.PROMPTS: 20})
    made = config(
        "train.steps=3", f"train.init_from={tmp_path / 'flow'}", variant=":image_free",
        records=(str(prompts),),
    )
    final = train(made, str(tmp_path / "free"), progress=False)
    _, _, start, _ = checkpoints.load_weights(tmp_path / "flow", raw=True)
    moved = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(jax.tree.leaves(final.params), jax.tree.leaves(start), strict=True)
    ]
    assert max(moved) > 1e-4 and np.isfinite(moved).all()


@pytest.mark.parametrize(
    ("splits", "fields", "overrides", "message"),
    [
        ({"8x8": 9}, {"family": "sana"}, (), "for 'sana', but model is 'minilm_dit'"),
        ({"8x8": 9}, {"text_encoder": "BertModel 22.7M 123456"}, (),
         "text encoder BertModel 22.7M 123456, but pipeline"),
        ({"8x6": 9}, {}, (), "divisible by 4"),
        ({"8x8": 9}, {}, ("data.weights=(1.0,2.0)",), "2 numbers for 1 folders"),
        ({"8x8": 9}, {}, ("data.weights=(0.0,)",), "give more than 0"),
        ({"8x8": 9}, {}, ("data.text_tokens=0,16",), r"\(0, 16\); give 1 or more"),
        ({"8x8": 9}, {}, ("data.text_tokens=16,16",), r"\(16, 16\); give .* increasing ones"),
        ({"8x8": 9}, {}, ("data.text_tokens=1,16",), "has 1, but the condition .* has 2 tokens"),
        ({"8x8": 5}, {}, (), "5 rows to train on, too few for a batch of 8"),
        ({records.PROMPTS: 9}, {}, (), "prompts without pictures"),
        ({records.PROMPTS: 9}, {}, ("objective=image_free", "train.init_from=a_start",
         "train.flow_matching_steps=1"), "without train.flow_matching_steps"),
        ({"8x8": 9}, {}, ("pipeline=random",), "pipeline is random"),
    ],
)
def test_bad_records_are_refused(write, config, tmp_path, splits, fields, overrides, message):
    folder = write("bad", splits, **fields)
    with pytest.raises(UserError, match=message):
        train(config(*overrides, records=(str(folder),)), str(tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_shape_with_less_than_a_batch_is_told(write, config):
    made = config("data.text_tokens=8,16", records=(str(write("few", {"8x8": 9})),))
    with pytest.warns(UserWarning, match="a batch of 8, .* 8 text tokens has 3; .* 16 .* 6$"):
        checks.check_fit(made, inputs.open_data(made))


def test_unfinished_records_are_refused(config, tmp_path):
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match="no complete records"):
        train(config(records=(str(tmp_path / "half"),)), str(tmp_path / "run"), progress=False)


def damaged(folder):
    """With some bytes gone."""
    file = records.shard_file(folder, "8x8", 0, 1)
    data = bytearray(file.read_bytes())
    data[400:3000] = bytes(2600)
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged, "record . of 8x8 in .* cannot be read"),  # raised in the threads that read ahead
        (lambda folder: records.shard_file(folder, "8x8", 0, 1).unlink(), "lacks 1 of its files"),
        (lambda folder: (folder / "dataset_info.json").unlink(), "cannot be read as a TFDS"),
    ],
)
def test_damaged_records_end_in_one_line(write, config, tmp_path, damage, message):
    folder = write("damaged", {"8x8": 9})
    damage(folder)
    made = config("sample.prompts=('a cat',)", records=(str(folder),))
    with pytest.raises(UserError, match=message):
        train(made, str(tmp_path / "run"), progress=False)


def test_previews_show_captions_longer_than_a_step_takes(write, config, tmp_path):
    made = config("data.text_tokens=4", records=(str(write("long", {"8x8": 9})),))
    known = inputs.prepare(made, inputs.open_data(made), tmp_path)
    assert known.shown["tokens"].shape == (8, 4, 48) and known.shown["mask"].all()


def test_other_encoders_do_not_mix(write, config, tmp_path):
    one, other = write("a", {"8x8": 9}), write("b", {"8x8": 9}, text_encoder="BertModel 1M 000000")
    made = config(records=(str(one), str(other)))
    with pytest.raises(UserError, match="BertModel 1M 000000, but .* has BertModel"):
        train(made, str(tmp_path / "run"), progress=False)


@pytest.mark.parametrize(
    "variant", ["half_r", pytest.param("gated_1", marks=pytest.mark.slow)]
)
def test_adapters_see_r_otherwise_on_what_was_trained_on_velocities(
    write, config, tmp_path, variant
):
    """At first they are their base where that was trained, at r = t or 0."""
    data = {"records": (str(write("lora", {"8x8": 16})),)}
    flow, jumps = tmp_path / "flow", tmp_path / "jumps"
    train(config(variant=":flow", **data), str(flow), progress=False)
    train(config("train.steps=1", **data), str(jumps), progress=False)
    make = lambda start: config(
        f"train.init_from={start}", "train.steps=2", file="emoji_lora", variant=f":{variant}",
        **data,
    )
    with pytest.raises(UserError, match="time_conditioning is 'second_embedder' there"):
        train(make(jumps), str(tmp_path / "refused"), progress=False)
    assert not (tmp_path / "refused").exists()

    prepared = setup.prepare(make(flow))
    started = loop.start(prepared, checkpoints.Saver(tmp_path / "none", 1))
    run, base, params, _ = checkpoints.load_weights(flow)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, *run.model.sample_shape)).astype(np.float32)
    t, none = np.array([0.9, 0.5, -0.3], np.float32), np.zeros(3, np.float32)
    cond = jax.tree.map(lambda a: np.repeat(a, 3, axis=0), base.null)
    wanted = jax.jit(base.apply)(params, x, t, t, cond)
    ours = jax.jit(prepared.model.apply)
    found = ours(started.params, x, t, none, cond)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    end = train(make(flow), str(tmp_path / "run"), progress=False)
    assert np.any(ours(end.params, x, t, none, cond) != wanted)

"""Training on edits: their sources are in every pass, and in what stands for none too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.test_verbs import call
from twinflow_jax import config as configs
from twinflow_jax import convert, evaluate, models, sample
from twinflow_jax.checkpoints import random
from twinflow_jax.data import records
from twinflow_jax.errors import UserError
from twinflow_jax.objectives import Batch
from twinflow_jax.training import records as training_records
from twinflow_jax.training.loop import train

SPLITS = {"32x32_32x32": 9, "32x32_32x32_64x32": 8}  # the result, the sources: records
FIELDS = (
    "data.batch_size=4", "data.text_tokens=16", "train.steps=4", "train.log_every=1",
    "train.checkpoint_every=2", "train.sample_every=4", "sample.steps=(1,)", "sample.columns=1",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random.write_random("qwen_image_edit_plus", tmp_path_factory.mktemp("c") / "c", 0)


@pytest.fixture(scope="module")
def write(checkpoint, tmp_path_factory):
    """A function that writes records of edits: (splits, other fields) -> folder."""
    def make(splits=SPLITS, **fields):
        folder, rng = tmp_path_factory.mktemp("records"), np.random.default_rng(0)
        manifest = records.Manifest(**{
            "family": "qwen_image_edit_plus", "text_encoder": checkpoint.text_identity,
            "text_width": 64, "autoencoder": checkpoint.identity("vae"), "channels": 16,
            "downscale": 8, "edits": True, **fields,
        })
        normal, shards = lambda *shape: rng.standard_normal(shape).astype(np.float16), {}
        for split, count in splits.items():
            shapes = [[int(side) // 8 for side in one.split("x")][::-1] for one in split.split("_")]
            examples = [
                records.Example(
                    f"{split}/{row}", ("one", "another"), (normal(3, 64), normal(5, 64)),
                    normal(*shapes[0], 16), (50, 60), records.Edit(
                        normal(6, 64), normal(2, 64),
                        tuple(normal(*shape, 16) for shape in shapes[1:]),
                    ) if manifest.edits else None,
                ) for row in range(count)
            ]
            path = records.shard_file(folder, split, 0, 1)
            shards[split] = [(count, records.write_shard(path, examples, manifest))]
        records.finish(folder, manifest, shards, {})
        return folder

    return make


@pytest.fixture(scope="module")
def config(checkpoint):
    def make(folder, *overrides: str, name: str = "qwen_edit_tpu"):
        given = (f"pipeline={checkpoint.folder}", f"data.records=('{folder}',)", *FIELDS)
        return configs.parse(f"configs/{name}.py:tiny", [*given, *overrides])

    return make


def test_rows_are_what_was_written(write, config):
    run = config(write())
    [folder] = training_records.open_folders(run.data.records, run.model, image_free=False)
    shapes = training_records.streams([folder], (), run.model, (16,))
    one, two = (models.Shape((4, 4, 16), 16, ((4, 4, 16), *more)) for more in ((), ((4, 8, 16),)))
    assert list(shapes) == [one, two]
    streams = list(shapes.values())
    picked = set()
    for epoch in range(8):
        batch = streams[1][0].read(np.array([5, 2]), np.array([[0, epoch, 0, 5], [0, epoch, 0, 2]]))
        example = folder.read("32x32_32x32_64x32", 5)
        references = example.edit.references
        np.testing.assert_array_equal(batch["x"][0], example.sample.astype(np.float32))
        for name, tail in (("cond", None), ("null", example.edit.null)):
            valid = batch[name]["tokens"][0][batch[name]["mask"][0]]
            np.testing.assert_array_equal(valid[:6], example.edit.shown)
            if tail is None:
                [tail] = [t for t in example.tokens if len(t) == len(valid) - 6]
                picked.add(len(tail))
            np.testing.assert_array_equal(valid[6:], tail)
            for ours, theirs in zip(batch[name]["references"], references, strict=True):
                np.testing.assert_array_equal(ours[0], theirs.astype(np.float32))
    assert picked == {3, 5}
    # 6 tokens of the pictures, and at most 5 of an instruction, whose bucket all go to.
    fitting = training_records.streams([folder], (), run.model, (8, 11, 16))
    assert [(one.text, stream.count) for one, [stream] in fitting.items()] == [(11, 9), (11, 8)]
    [_, [narrow]] = training_records.streams([folder], (), run.model, (7,)).values()
    with pytest.raises(UserError, match="record 32x32_.* the instruction that .* have 8 tokens"):
        narrow.read(np.array([5]), np.array([[0, 0, 0, 5]]))


@pytest.mark.parametrize("order", ["order2", "order1"])
def test_every_pass_has_its_rows_own_sources(order):
    """Also where rows of several passes are joined, at both signs of t, with and without the
    instruction."""
    objective = configs.parse(f"configs/qwen_edit_lora_tpu.py:{order}").bound_objective
    rows, seen = 12, set()
    number = jnp.arange(rows, dtype=jnp.float32)
    at = lambda *shape: number.reshape(-1, *(1,) * len(shape)) + jnp.zeros((rows, *shape))

    def about(unsaid: float):
        return {"tokens": at(3, 4).at[:, -1].set(unsaid), "references": (at(2, 2, 1), at(1, 2, 1))}

    def apply(params, x_t, t, r, cond):
        of = cond["tokens"][:, 0, 0]
        for latents in cond["references"]:
            np.testing.assert_array_equal(latents, jnp.broadcast_to(
                of.reshape(-1, 1, 1, 1), latents.shape
            ))
        unsaid = np.asarray(cond["tokens"][:, -1, 0]).tolist()
        seen.update(zip(np.sign(t).tolist(), unsaid, strict=True))
        return x_t * params

    draws = objective.draw(jax.random.key(0), rows, (2, 2, 1))
    batch = Batch(at(2, 2, 1), about(0.0), about(1.0))
    objective.loss(apply, jnp.float32(1), jnp.float32(2), batch, draws, None)
    assert {(1.0, 0.0), (-1.0, 0.0), (1.0, 1.0)} <= seen


@pytest.fixture(scope="module")
def trained(write, config, checkpoint, tmp_path_factory):
    """The folder of a run of adapters."""
    run = config(
        write({"32x32_32x32": 9}), f"train.init_from={checkpoint.folder}",
        "model.time_conditioning=second_embedder", name="qwen_edit_lora_tpu",
    )
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert int(train(run, str(folder), progress=False).step) == 4
    return folder


def test_pictures_are_beside_their_sources(trained):
    """Eight rows of one picture after one evaluation, each after its source."""
    with Image.open(trained / "samples/step_000004.png") as sheet:
        assert sheet.text["rows"] == "\n".join(["one"] * 8)
        tile = round(220 / 33) * 33
        assert sheet.height >= 8 * tile and sheet.width > 2 * tile


def drawn(folder, *ways) -> list[np.ndarray]:
    """One edit in one evaluation, by each way: a checkpoint and options."""
    noise = np.random.default_rng(0).integers(0, 255, (90, 60, 3), np.uint8)
    Image.fromarray(noise).save(folder / "in.png")
    given = ("--image", str(folder / "in.png"), "--prompt", "make it night", "--steps", "1")
    found = []
    for number, way in enumerate(ways):
        out = folder / f"drawn_{number}"
        assert call(sample, "--checkpoint", *map(str, way), *given, "--out", str(out)) == 0
        found += [np.asarray(Image.open(file), int) for file in out.iterdir()]
    return found


@pytest.mark.slow
def test_an_export_of_all_weights_draws_as_its_run(write, config, tmp_path):
    """In the size that it was trained in, which its config.json says."""
    run, out, again = (str(tmp_path / name) for name in ("run", "out", "again"))
    assert int(train(config(write()), run, progress=False).step) == 4  # of records of two shapes
    assert call(convert, "export", run, out) == 0
    assert call(convert, "import", "--family", "qwen_image_edit_plus", out, again) == 0
    ours, theirs = drawn(tmp_path, (run,), (again,))
    assert ours.shape == (90, 60, 3) and np.abs(ours - theirs).max() <= 1


@pytest.mark.slow
def test_exported_adapters_draw_as_their_run(trained, checkpoint, tmp_path):
    exported, merged = str(tmp_path / "exported"), str(tmp_path / "merged")
    assert call(convert, "adapter", "export", str(trained), exported) == 0
    assert "have 4x4 latents" in (tmp_path / "exported/README.md").read_text()
    assert call(convert, "adapter", "merge", str(checkpoint.folder), exported, merged) == 0
    base = checkpoint.folder, "--adapter", exported
    ours, *theirs, raw = drawn(tmp_path, (trained,), base, (merged,), (trained, "--raw"))
    assert ours.shape == (90, 60, 3)
    assert all(np.abs(ours - one).max() <= 1 for one in theirs) and np.abs(ours - raw).max() > 1


@pytest.mark.parametrize("given, overrides, says", [
    ({"fields": {"family": "qwen_image", "edits": False}, "splits": {"32x32": 9}}, (),
     "for 'qwen_image', but model is 'qwen_image_edit_plus'"),
    ({}, ("model.name=qwen_image",), "for 'qwen_image_edit_plus', but model is 'qwen_image'"),
    ({}, ("train.unconditional=permuted",), "what stands for no instruction is about a row's own"),
    ({}, ("sample.prompts=('a cat',)",), "sample.prompts is set, but model"),
    ({"splits": {"32x32_32x24": 9}}, (), "any size divisible by 2"),
])
def test_what_cannot_be_trained_on_is_refused(given, overrides, says, write, config, tmp_path):
    folder = write(given.get("splits", {"32x32_32x32": 9}), **given.get("fields", {}))
    with pytest.raises(UserError, match=says):
        train(config(folder, *overrides), str(tmp_path / "run"), progress=False)


def test_captions_do_not_score_edits(write, capsys):
    folder = str(write({"32x32_32x32": 9}))
    given = "--records", folder, "--train-records", folder, "--features", "none"
    assert call(evaluate, "captions", "--checkpoint", "run", *given) == 2
    says = "holds edits, which captions alone do not draw: benchmarks/edits.py scores"
    assert says in capsys.readouterr().err


def test_sources_of_another_shape_in_a_batch_are_refused(write):
    """As where records of one size were moved among those of another."""
    folder = write({"32x32_32x32": 3, "32x32_64x64": 3})
    other = records.shard_file(folder, "32x32_64x64", 0, 1)
    other.copy(records.shard_file(folder, "32x32_32x32", 0, 1), overwrite=True)
    says = r"record 32x32_64x64/. of 32x32_32x32 in .* has 64 latents of sources, not 16: one batch"
    with pytest.raises(UserError, match=says):
        records.open_records(folder).read("32x32_32x32", 0)

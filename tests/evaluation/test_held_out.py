"""`evaluate` of text-to-image runs, with small random networks."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.test_verbs import call
from twinflow_jax import config as configs
from twinflow_jax import evaluate, objectives
from twinflow_jax.checkpoints import random
from twinflow_jax.config import Run
from twinflow_jax.data import records
from twinflow_jax.drawing import Pipeline, text
from twinflow_jax.evaluation import features, held_out
from twinflow_jax.training import defaults
from twinflow_jax.training.loop import train

MODEL = {
    "name": "minilm_dit", "sample_shape": (8, 8, 3), "patch": 4, "width": 32, "depth": 1,
    "heads": 2, "text_width": 48,
}


def write_records(folder, pipeline, captions, size="8x8", **fields):
    """A picture for each caption, of a colour that its letters decide."""
    manifest = records.Manifest(**{
        "family": "minilm_dit", "text_encoder": pipeline.checkpoint.identity("text_encoder"),
        "text_width": 48, "autoencoder": "", "channels": 3, "downscale": 1, **fields,
    })
    embedded, examples = text.embed(pipeline, captions, 16), []
    width, height = (0, 0) if size == records.PROMPTS else map(int, size.split("x"))
    for row, caption in enumerate(captions):
        tokens = embedded.tokens[row][embedded.mask[row]]
        colour = np.random.default_rng(list(caption.encode())).uniform(-1, 1, 3)
        sample = np.broadcast_to(colour, (height, width, 3)) if width else None
        examples.append(records.Example(str(row), [caption], [tokens], sample, (width, height)))
    folder.mkdir()
    size_of = records.write_shard(records.shard_file(folder, size, 0, 1), examples, manifest)
    text.null(pipeline).save(folder / records.NULL, [""])
    records.finish(folder, manifest, {size: [(len(captions), size_of)]}, {})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Records for training and held out, and a run on them by flow matching."""
    root = tmp_path_factory.mktemp("drawing")
    checkpoint = random.write_random("minilm_dit", root / "pipeline", seed=0)
    pipeline = Pipeline(checkpoint, "float32", progress=False)
    write_records(root / "train", pipeline, [f"picture {i}" for i in range(90)])
    # One caption twice: it is drawn once.
    write_records(root / "held_out", pipeline, [f"other {i}" for i in range(12)] + ["other 3"])
    write_records(root / "large", pipeline, ["one", "two"], size="16x8")
    write_records(root / "prompts", pipeline, ["one", "two"], size=records.PROMPTS, channels=0)
    write_records(root / "else", pipeline, ["one", "two"], text_encoder="BertModel 1M abcdef")
    config = defaults.get()
    config.unlock()
    config.pipeline, config.model = str(root / "pipeline"), MODEL
    config.objective = objectives.preset("flow_matching")
    config.data.update(records=(str(root / "train"),), batch_size=8, text_tokens=16)
    config.train.update(steps=2, condition_dropout=0.1, sample_every=100, ema_decay=0.0)
    config.optimizer.learning_rate = 0.03  # far from the velocity 0 of a new network
    config.sample.update(prompts=("a cat",), steps=(1,), columns=1, score_count=0)
    train(Run.of(config.to_dict()), str(root / "run"), progress=False)
    small = ["model.width=8", "data.batch_size=8", "train.steps=1", "sample.score_count=0"]
    train(configs.parse("configs/digits.py", small), str(root / "classes"), progress=False)
    return root


def arguments(made, **other):
    given = {
        "--checkpoint": made / "run", "--records": made / "held_out",
        "--train-records": made / "train", "--features": made / "features.safetensors",
        "--seeds": 2, **other,
    }
    return ["captions", *(str(part) for pair in given.items() for part in pair)]


def test_evaluate_scores_a_run_on_held_out_captions(made, tmp_path, capsys, monkeypatch):
    """By features that are the pixels of a copy of 4 x 4."""
    seen = []

    def see(self, x):
        seen.append(len(x))
        return np.asarray(features.scaled(jnp.asarray(x), 4)).reshape(len(x), -1).astype(np.float64)

    monkeypatch.setattr(features.Network, "__call__", see)
    monkeypatch.setattr(features, "load", lambda file: features.Network({}, b"pixels"))
    monkeypatch.setenv("TWINFLOW_CACHE", str(tmp_path / "cache"))
    files = {f"--{name}": tmp_path / name for name in ("json", "plot", "sheet")}
    assert call(evaluate, *arguments(made, **{"--steps": "1,4"}, **files)) == 0
    table = capsys.readouterr().out
    record = json.loads((tmp_path / "json").read_text())
    assert record["captions"] == 12 and record["seeds"] == 2
    assert [row["nfe"] for row in record["scores"]] == [1, 4]
    for row in record["scores"]:
        assert row["step"] == 2 and row["diversity"] > 0 and row["nearest"] > 0
        assert 0 <= row["retrieval"] <= 1 and f"{row['frechet']:.2f}" in table
    assert {"retrieval", "frechet", "kernel", "diversity", "nearest"} <= record["real"].keys()
    assert "R@1" in table and "accuracy" not in table
    with Image.open(tmp_path / "sheet") as sheet:
        assert sheet.text["rows"].splitlines()[0] == "other 0"
    # Real pictures are seen once, drawn ones each time.
    assert sorted(seen) == [12, 24, 24, 90]
    assert call(evaluate, *arguments(made, **{"--steps": "1,4"})) == 0
    assert capsys.readouterr().out == table and seen[4:] == [24, 24]


def test_what_is_drawn_depends_on_the_caption_and_seed_alone(made):
    reals, _ = held_out.open_pair(made / "held_out", made / "train")
    run = held_out.open_run(str(made / "run"), False, None, reals)
    decode = held_out.decoder(reals, run.pipeline)
    captions = held_out.hold_out(reals, None, decode)
    assert captions.texts == tuple(f"other {i}" for i in range(12))
    guided = held_out.plain(run, 4, 3.0)
    draw = lambda seed, sampler: held_out.draw(run, captions, 2, seed, sampler, decode)
    first = draw(0, guided)
    assert first.shape == (24, 8, 8, 3) and np.abs(first).max() <= 1
    np.testing.assert_array_equal(draw(0, guided), first)
    assert np.abs(first[0] - first[1]).max() > 0.1  # two seeds of one caption
    assert np.abs(draw(1, guided) - first).max() > 0.1
    assert np.abs(draw(0, held_out.plain(run, 2, 1.0)) - first).max() > 1e-3
    other = dataclasses.replace(captions, cond=captions.cond[::-1])
    assert np.abs(held_out.draw(run, other, 2, 0, guided, decode) - first).max() > 1e-3


def test_bad_input_is_one_line(made, capsys):
    cases = [
        ({"--records": made / "large", "--train-records": made / "large"}, "hold samples of"),
        ({"--records": made / "else", "--train-records": made / "else"}, "with the text encoder"),
        ({"--records": made / "else"}, "made with other networks"),
        ({"--records": made / "prompts"}, "prompts alone: give records with pictures"),
        ({"--features": made / "run" / "config.json"}, "no safetensors file"),
        ({"--guidance": 2.0, "--steps": "1"}, "even --steps"),
        ({"--guidance": 2.0, "--style": "any"}, "--style cannot be used"),
        ({"--checkpoint": made / "classes"}, "draws by class: use `evaluate classes`"),
        ({"--seeds": 0}, "--seeds is 0"),
        ({"--seeds": 10**12}, "at most 100,000 pictures: give fewer --seeds or a --count"),
        ({"--seeds": 60_000, "--count": 10**12}, "at most 100,000 pictures"),
        ({"--count": 1}, "at least 2 captions"),
        ({"--steps": "0"}, "0 is no whole number"),
    ]
    for change, message in cases:
        assert call(evaluate, *arguments(made, **change)) == 2, change
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error, (change, error)
    assert call(evaluate, "classes", "--checkpoint", str(made / "run")) == 2
    assert "use `evaluate captions`" in capsys.readouterr().err

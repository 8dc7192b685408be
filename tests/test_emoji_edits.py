"""Edits of emoji: the pairs, and the family that a laptop trains on them."""

import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from tests.test_verbs import call
from twinflow_jax import config as configs
from twinflow_jax import encode, models
from twinflow_jax.checkpoints.random import write_random
from twinflow_jax.errors import UserError
from twinflow_jax.models import minilm_edit
from twinflow_jax.training.loop import train

ROOT = pathlib.Path(__file__).parents[1]
PLAIN, DARK, LIGHT, HEART = "1f449", "1f449-1f3ff", "1f449-1f3fb", "1f496"
BLANK = "google/2b1c"
KNOWN = (  # one has two tones; of one the set has another style, which it is drawn in
    *(f"google/{code}" for code in (PLAIN, DARK, LIGHT, "1f91d-1f3fb-200d-1f3ff", HEART)),
    f"3d/{HEART}",
)


@pytest.fixture(scope="module")
def loaded():
    def load(place: str):
        name = pathlib.Path(place).stem
        spec = importlib.util.spec_from_file_location(f"{name}_file", ROOT / place)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def emoji(loaded, tmp_path_factory) -> pathlib.Path:
    """A set as tools/emoji.py writes it, and its edits."""
    folder, rng = tmp_path_factory.mktemp("emoji"), np.random.default_rng(0)
    rows = []
    for name in KNOWN:
        file = folder / f"images/{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(file)
        rows.append(json.dumps({"id": name, "image": f"images/{name}.png"}) + "\n")
    Image.new("RGB", (64, 64), (127, 127, 127)).save(folder / f"images/{BLANK}.png")
    rows.append(json.dumps({"id": BLANK, "image": f"images/{BLANK}.png"}) + "\n")
    (folder / "train.jsonl").write_text("".join(rows))
    (folder / "held_out_concepts.jsonl").write_text(rows[0])
    tool = loaded("tools/emoji_edits.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["emoji_edits.py", str(folder)])
        tool.main()
        patch.setattr("sys.argv", ["emoji_edits.py", str(folder / "images")])
        with pytest.raises(UserError, match="train.jsonl is missing: write the set with"):
            tool.main()
    return folder


def test_pairs(loaded, emoji):
    tool = loaded("tools/emoji_edits.py")
    rows = [json.loads(line) for line in (emoji / "edits.jsonl").read_text().splitlines()]
    found = {(row["source"], row["instruction"]): row["target"] for row in rows}
    image = "images/{}.png".format
    assert len(found) == len(rows) == 2 + 2 * 4 + 2 * len(KNOWN)
    assert not any(BLANK in source for source, _ in found)  # no way to change it shows
    assert found[image(f"google/{HEART}"), "draw it in a 3d style"] == image(f"3d/{HEART}")
    assert found[image(f"3d/{HEART}"), "draw it in Google's style"] == image(f"google/{HEART}")
    mirrored = "changed/mirrored/google/{}.png".format
    for source in (PLAIN, LIGHT):
        assert found[image(f"google/{source}"), "give it dark skin"] == image(f"google/{DARK}")
        assert found[mirrored(source), "give it dark skin"] == mirrored(DARK)
    for name in KNOWN:
        made = [
            (said, change) for said, change in tool.CHANGES.values() if (image(name), said) in found
        ]
        assert [said == "mirror it" for said, _ in made] == [True, False]
        for said, change in made:
            both = image(name), found[image(name), said]
            source, target = (Image.open(emoji / file) for file in both)
            np.testing.assert_array_equal(np.asarray(target), np.asarray(change(source)))
    held_out = (emoji / "edits_held_out.jsonl").read_text().splitlines()
    assert len(held_out) == 2  # one picture, mirrored and in other colours
    several = {f"{style}/{code}": f"{style} {code}" for style in tool.STYLES for code in range(100)}
    drawn = list(tool.styles(several))  # one of eight, in one other style of the two
    assert 20 < len(drawn) == len({source for _, source, _ in drawn}) < 55
    for said, source, target in drawn:
        (before, code), (after, same) = source.split(), target.split()
        assert code == same and before != after and said == f"draw it in {tool.STYLES[after]} style"


def test_the_network_estimates_the_picture():
    """Before its last projection learns that is zero everywhere: the velocity is x_t / t."""
    config = minilm_edit.Config(
        sample_shape=(8, 8, 3), layers=1, heads=1, head_dim=8, rope_axes=(2, 2, 4), text_width=4,
    )
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x, t = normal(3, 8, 8, 3), np.array([0.9, -0.5, 0.1], np.float32)
    cond = {
        "tokens": normal(3, 2, 4), "mask": np.ones((3, 2), bool),
        "references": (normal(3, 8, 8, 3),),
    }
    model = models.build(config)
    params = model.init(jax.random.key(0))
    velocity = jax.jit(model.apply)(params, x, t, 0 * t, cond)
    least = np.array([0.9, 0.5, 0.3]).reshape(3, 1, 1, 1)  # a small t is not divided by
    np.testing.assert_allclose(velocity, x / least, rtol=1e-5)


def test_the_family_trains_on_them(loaded, emoji, tmp_path, capsys, monkeypatch):
    pipeline = write_random("minilm_edit", tmp_path / "c", 0).folder
    records = str(tmp_path / "r")
    given = str(emoji / "edits.jsonl"), records, "--pipeline", str(pipeline), "--size", "32"
    assert call(encode, *given) == 0
    run = configs.parse("configs/emoji_edit.py:flow", [
        f"pipeline={pipeline}", f"data.records=('{records}',)", "data.batch_size=4",
        "data.text_tokens=22", "train.steps=2", "model.layers=1", "model.heads=1",
        "model.text_width=48", "sample.steps=(1,)", "sample.columns=1",
    ])
    assert int(train(run, str(tmp_path / "run"), progress=False).step) == 2
    judge = loaded("benchmarks/edits.py")
    monkeypatch.setattr(judge, "ROWS", 6)
    sheet, shares, figure = (tmp_path / name for name in ("sheet.png", "shares.json", "edits.png"))
    given = f"{tmp_path / 'run'}:2,4", "--records", records, "--guidance", "2"
    monkeypatch.setattr(
        "sys.argv", ["edits.py", *given, "--sheet", str(sheet), "--json", str(shares),
                     "--figure", str(figure)]
    )
    judge.main()
    told = capsys.readouterr().out
    assert "18 edits of" in told and "colours 0." in told and "skin tones 0." in told
    with Image.open(figure) as picture:  # wider than high: instructions are columns
        assert picture.width > picture.height > 300
    assert [row["nfe"] for row in json.loads(shares.read_text())["scores"]] == [2, 4]
    with Image.open(sheet) as picture:  # sources, two numbers of evaluations, results
        said = picture.text["rows"].split("\n")
        assert len(said) == 12 and picture.height >= 12 * 33 and picture.width >= 4 * 33
    first = [judge.spread(["a", "b", "a", "b", "a"] * 4)[place] for place in (0, 5, 6, 11)]
    assert first == [0, 9, 1, 13]  # six of each, those of one instruction together
    monkeypatch.setattr("sys.argv", ["edits.py", str(tmp_path / "run"), "--records", records])
    with pytest.raises(UserError, match="is not of the form RUN:1,4"):
        judge.main()
    monkeypatch.setattr("sys.argv", ["edits.py", f"{tmp_path / 'run'}:1"])
    with pytest.raises(UserError, match="was trained on records: give --records"):
        judge.main()
    targets = np.random.default_rng(0).standard_normal((5, 2, 2, 3)).astype(np.float32)
    others = np.roll(targets, 1, axis=0)
    sources = others + np.float32(0.2)
    assert judge.right(targets + 0.1, targets, sources, 5).all()
    assert not judge.right(others + 0.1, targets, sources, 5).any()
    far = judge.right(others + 0.1, targets, None, 5), judge.right(others + 0.1, targets, None, 1)
    assert not far[0].any() and far[1].all()  # alone, its own is the nearest

"""Edits to records: sources as people's sets have them, and what a record of one is."""

import io
import json
import pathlib
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from pictures import png
from PIL import Image

from twinflow_jax import encode as tool
from twinflow_jax.checkpoints.random import write_random
from twinflow_jax.data.records import Manifest, open_records
from twinflow_jax.drawing import codec, editing, open_pipeline
from twinflow_jax.encoding import index, open_edits, sizes, workspace
from twinflow_jax.encoding.edits import SETS
from twinflow_jax.errors import UserError

SIZE = ("--size", "64")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    return write_random("qwen_image_edit_plus", tmp_path_factory.mktemp("random") / "c", 0).folder


def written(folder: pathlib.Path, names: dict[str, int]) -> pathlib.Path:
    """Pictures of these names, each of its seed."""
    for name, seed in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(seed))
    return folder


def in_lines(folder, rows, name="edits.jsonl") -> pathlib.Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


PAIR = {"a.png": 1, "b.png": 2}
TWO = ["make it night", "draw it at night"]


def share_gpt(folder):
    row = {"input_prompt": TWO, "input_image": ["a.png"], "output_image": "b.png"}
    (written(folder, PAIR) / "text_and_image_to_image.json").write_text(json.dumps([row]))
    return folder / "text_and_image_to_image.json"


def musubi(folder):
    row = {"image_path": "b.png", "control_path_0": "a.png", "caption": TWO}
    return in_lines(written(folder, PAIR), [row])


def imgedit(folder):  # paths in Parquet
    row = {"input_images": [["a.png"]], "output_images": [["b.png"]], "prompt": [TWO]}
    pyarrow.parquet.write_table(pyarrow.table(row), written(folder, PAIR) / "part.parquet")
    return folder


def omniedit(folder):  # bytes in it
    image = lambda seed: [{"bytes": png(seed), "path": None}]
    row = {"src_img": image(1), "edited_img": image(2), "edited_prompt_list": [TWO]}
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table(row), folder / "part.parquet")
    return folder / "part.parquet"


def by_columns(columns):
    def form(folder):  # of JSON lines
        row = {columns.instruction: TWO, columns.source: "a.png", columns.target: "b.png"}
        return in_lines(written(folder, PAIR), [row])

    return pytest.param(form, id=columns.source)


def folders(folder):
    written(folder, {"target/x/cat.png": 2, "control/x/cat_0.png": 1})
    (folder / "target/x/cat.txt").write_text("\n".join(TWO))
    return folder


@pytest.mark.parametrize("form", [
    share_gpt, musubi, imgedit, omniedit, folders, *map(by_columns, SETS),
])
def test_each_form_gives_the_same_edit(form, tmp_path):
    source = open_edits(str(form(tmp_path / "set")), 4, 3, (None, None, None))
    [item] = source.items(source.chunks[0])
    entry = index.examine(source, item, 64)
    assert entry.problem is None and list(entry.captions) == TWO
    assert [source.read(one.place) for one in entry.pictures] == [png(2), png(1)]
    assert index.Entry.from_json(json.dumps(index.dataclasses.asdict(entry))) == entry
    assert source.fingerprint() == open_edits(
        str(tmp_path / "set" / (source.name if source.name != "set" else "")), 4, 3, (None,) * 3
    ).fingerprint()


def test_folders_of_several_sources(tmp_path):
    written(tmp_path, {"target/cat.png": 3, "source/cat.png": 1, "source_2/cat.png": 2})
    (tmp_path / "target/cat.txt").write_text("put both together")
    source = open_edits(str(tmp_path), 4, 3, (None, None, None))
    [item] = source.items(source.chunks[0])
    assert [source.read(place) for place in (item.place, *item.sources)] == [*map(png, (3, 1, 2))]


def test_columns_of_other_names(tmp_path):
    written(tmp_path, PAIR)
    file = in_lines(tmp_path, [{"say": "x", "before": ["a.png"], "after": "b.png"}])
    with pytest.raises(UserError, match="has no edits that are known; it has say, before, after"):
        open_edits(str(file), 4, 3, (None, None, None))
    source = open_edits(str(file), 4, 3, ("say", "before", "after"))
    [item] = source.items(source.chunks[0])
    assert (item.captions, item.place, item.sources) == (("x",), "b.png", ("a.png",))


def test_source_and_target_are_cut_alike():
    """A mark stays where it is in a source of nearly the target's proportions; one of others goes
    to its own bucket."""
    def cut(size, like):
        picture = np.zeros((*size[::-1], 3), np.uint8)
        picture[:, round(size[0] * 0.3) :] = 255
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        return (sizes.decode(file.getvalue(), (640, 960), like)[0, :, 0] > 127).argmax()

    target, source = (1000, 750), (520, 387)
    assert sizes.alike(source, target) and not sizes.alike((520, 396), target)
    assert cut(source, target) == cut(target, None)
    assert cut(source, None) != cut(target, None)  # by itself it is cut otherwise


def run(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    """Status, stdout and the last line of stderr."""
    monkeypatch.setattr(sys, "argv", ["encode.py", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        tool.run_verb(tool.main)
    out, err = capsys.readouterr()
    return end.value.code or 0, out, (err.strip().splitlines() or [""])[-1]


ROWS = [
    {"id": "one", "instruction": TWO, "source": "a.png", "target": "b.png"},
    {"id": "two", "instruction": "turn it", "source": ["b.png"], "target": "c.png"},
    {"id": "three", "instruction": "put both together", "source": ["a.png", "b.png"],
     "target": "c.png"},
]
BAD = [
    ({"id": "none", "instruction": "x", "target": "b.png"}, "no source"),
    ({"id": "lost", "instruction": "x", "source": "no.png", "target": "b.png"}, "unreadable"),
    ({"id": "text", "instruction": "x", "source": "edits.jsonl", "target": "b.png"}, "unreadable"),
    ({"id": "dot", "instruction": "x", "source": "dot.png", "target": "b.png"}, "too small"),
    ({"id": "wide", "instruction": "x", "source": "wide.png", "target": "b.png"}, "too large"),
    ({"id": "four", "instruction": "x", "source": ["a.png"] * 4, "target": "b.png"}, "unreadable"),
    ({"id": "out", "instruction": "x", "source": "../a.png", "target": "b.png"}, "unreadable"),
    ({"id": "blank", "instruction": " ", "source": "a.png", "target": "b.png"}, "no caption"),
    ({"id": "two targets", "instruction": "x", "source": "a.png", "target": ["a.png", "b.png"]},
     "unreadable"),
    ({"id": "long", "instruction": "a b " * 900, "source": "a.png", "target": "b.png"}, "too long"),
]


def content(folder) -> dict:
    """Everything that records hold, bit by bit."""
    found = open_records(folder)
    rows = {s: [found.source(s)[i] for i in range(count)] for s, count in found.splits.items()}
    told = lambda row: {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in row.items()}
    return {split: [told(row) for row in of] for split, of in rows.items()}


@pytest.fixture(scope="module")
def edits(tmp_path_factory) -> pathlib.Path:
    folder = written(tmp_path_factory.mktemp("edits"), PAIR | {"c.png": 3})
    (folder / "dot.png").write_bytes(png(0, (10, 10)))
    (folder / "wide.png").write_bytes(png(0, (20_000, 64)))
    return in_lines(folder, [*ROWS, *(row for row, _ in BAD)])


def test_records_of_edits(tmp_path, monkeypatch, capsys, checkpoint, edits):
    """What they hold, what they leave out, their bytes; and a stop that changes none of them."""
    given = (edits, tmp_path / "r", "--pipeline", checkpoint, *SIZE, "--shard-size", "1")
    stopped, written = [], workspace.Workspace.shard_file

    def stop(space, shard):
        stopped.append(shard)
        if len(stopped) == 4:
            raise KeyboardInterrupt
        return written(space, shard)

    monkeypatch.setattr(workspace.Workspace, "shard_file", stop)
    assert run(monkeypatch, capsys, *given)[0] == 130
    assert not (tmp_path / "r/records.json").exists()
    status, out, _ = run(monkeypatch, capsys, *given)
    assert status == 0 and "too long         1 left out" in out
    other = (edits, tmp_path / "whole", "--pipeline", checkpoint, *SIZE, "--shard-size", "1")
    assert run(monkeypatch, capsys, *other)[0] == 0
    assert content(tmp_path / "r") == content(tmp_path / "whole")

    found = open_records(tmp_path / "r")
    assert found.splits == {"64x64_64x64": 2, "64x64_64x64_64x64": 1}
    lines = (tmp_path / "r" / workspace.SKIPPED).read_text().splitlines()
    skipped = {row["id"]: row["reason"] for row in map(json.loads, lines)}
    assert skipped == {row["id"]: reason for row, reason in BAD}

    monkeypatch.setattr(editing, "area_of", lambda pipeline: 64 * 64)
    pipeline, decode = open_pipeline(checkpoint), lambda n: sizes.decode(png(n), (64, 64))
    encoded = lambda n: codec.encode(pipeline, decode(n)[None].astype(np.float32) / 127.5 - 1)[0]
    for split, row, seeds in (("64x64_64x64", 0, [2, 1]), ("64x64_64x64_64x64", 0, [3, 1, 2])):
        example = found.read(split, row)
        told = example.sample, *example.edit.references
        for ours, seed in zip(told, seeds, strict=True):
            np.testing.assert_allclose(ours, encoded(seed), atol=2e-3, rtol=2e-3)
        pictures = tuple(Image.fromarray(decode(seed)) for seed in seeds[1:])
        for caption, tail in zip(example.captions, example.tokens, strict=True):
            drawn = editing.Edit(caption, pictures)
            [(cond, null)] = editing.conditions(pipeline, [drawn], "Edit this image.")
            for theirs, mine in ((cond, tail), (null, example.edit.null)):
                ours = np.concatenate([example.edit.shown, mine])
                np.testing.assert_allclose(ours, theirs.tokens[theirs.mask], atol=5e-3, rtol=5e-3)

    # Of a record: the pictures' tokens once, and what comes after them.
    example, width = found.read("64x64_64x64", 0), found.manifest.text_width
    assert example.edit.shown.shape == (5 + 1 + 196 + 1, width)
    rows = 203 + len(example.edit.null) + sum(map(len, example.tokens))
    size = rows * width * 2 + 2 * example.sample.size * 2
    row = found.source("64x64_64x64")[0]
    stored = sum(value.nbytes for value in row.values() if isinstance(value, np.ndarray))
    assert size <= stored < size + 1000 < size + example.edit.shown.size * 2
    assert example.edit.null.shape[0] == 9
    # At 512x512 with the published widths and 25 tokens of an instruction, 15,000 in 30 GB.
    rows = len(example.edit.shown) + len(example.edit.null) + 25 + 5
    assert 15_000 * (rows * 3584 * 2 + 2 * 64 * 64 * 16 * 2) < 30.0e9


@pytest.mark.parametrize("source, more, says", [
    ("edits.jsonl", ["--text-tokens", "64"], "--text-tokens cannot be used"),
    ("edits.jsonl", ["--generate"], "--generate cannot be used"),
    ("photos.txt", [], "photos.txt holds no edits: give .jsonl"),
    ("folder", [], "holds no edits: give a folder with target/ and source/"),
    ("only_bad.jsonl", [], "none of the 1 items of the source can be used: none no source"),
])
def test_bad_input(source, more, says, tmp_path, monkeypatch, capsys, checkpoint, edits):
    written(tmp_path / "folder", {"a.png": 1})
    (tmp_path / "photos.txt").write_text("a photo")
    in_lines(tmp_path, [ROWS[0]])
    in_lines(tmp_path, [BAD[0][0] | {"source": []}], "only_bad.jsonl")
    given = (tmp_path / source, tmp_path / "r", "--pipeline", checkpoint, *SIZE, *more)
    status, _, error = run(monkeypatch, capsys, *given)
    assert status == 2 and says in error


def test_what_was_made_before_there_were_edits_is_as_it_was():
    told = Manifest("qwen_image", "an encoder", 4, "another", 16, 8).told()
    assert list(told) == [
        "family", "text_encoder", "text_width", "autoencoder", "channels", "downscale"
    ]

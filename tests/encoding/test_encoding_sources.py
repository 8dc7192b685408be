"""Every form of source gives the same pictures and captions, and says what cannot be used."""

import dataclasses
import errno
import json
import tarfile

import numpy as np
import pictures
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from PIL import Image

from twinflow_jax.encoding import index, open_source, sizes
from twinflow_jax.errors import UserError

COUNT = 9


def opened(path, wanted=True, chunk=4, image=None, caption=None):
    return open_source(str(path), wanted, chunk, image, caption)


def listed(source, min_side=64) -> list[index.Entry]:
    return [
        index.examine(source, item, min_side)
        for chunk in source.chunks for item in source.items(chunk)
    ]


@pytest.mark.parametrize("kind", list(pictures.WRITERS))
def test_each_form_gives_the_same_items(tmp_path, kind):
    source = opened(pictures.WRITERS[kind](tmp_path / kind, COUNT))
    entries = listed(source)
    assert len({entry.id for entry in entries}) == len(entries)
    usable = [entry for entry in entries if not entry.problem]
    found = {entry.captions: source.read(entry.place) for entry in usable}
    for _, captions, data in pictures.good(COUNT):
        read = found[captions]
        assert read == data if kind != "own" else sizes.measure(read) == sizes.measure(data)
        entry = next(entry for entry in usable if entry.captions == captions)
        assert entry.size == sizes.measure(data)
    reasons = sorted(entry.problem[0] for entry in entries if entry.problem)
    assert reasons == ([] if kind == "own" else ["no caption", "too small", "unreadable"])
    assert source.fingerprint() == opened(tmp_path / kind).fingerprint()


@pytest.mark.parametrize("kind", ["folder", "lines.jsonl", "parquet", "tars"])
def test_prompts_alone_need_no_pictures(tmp_path, kind):
    source = opened(pictures.WRITERS[kind](tmp_path / kind, COUNT), wanted=False)
    entries = [entry for entry in listed(source) if not entry.problem]
    assert not source.pictures and len(entries) == len(pictures.rows(COUNT)) - 1
    assert all(entry.image == "" and entry.place is None for entry in entries)


def test_a_list_of_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n\n  a hen \n")
    source = opened(tmp_path / "prompts.txt")
    assert [(e.id, e.captions) for e in listed(source)] == [
        ("prompts.txt:1", ("a fox",)), ("prompts.txt:3", ("a hen",)),
    ]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a fox"}\n{"text": ["a", "hen"]}\n')
    source = opened(tmp_path / "prompts.jsonl")
    assert [e.captions for e in listed(source)] == [("a fox",), ("a", "hen")]
    assert not source.pictures


def test_lines_do_not_leave_their_folder(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret.png").write_bytes(pictures.png(0))
    (inner / "own.png").write_bytes(pictures.png(1))
    absolute = str(tmp_path / "secret.png")
    places = ["../secret.png", absolute, "a/../../secret.png", "gs://x/y.png", 5]
    lines = [{"image": place, "caption": "x"} for place in [*places, "own.png", "gone.png"]]
    text = "\n".join(map(json.dumps, lines)) + "\nnot json\n[1]\n{}\n"
    (inner / "lines.jsonl").write_text(text)
    entries = listed(opened(inner / "lines.jsonl"))
    assert [entry.id for entry in entries if not entry.problem] == ["own.png"]
    assert {entry.problem[0] for entry in entries if entry.problem} == {"unreadable"}
    assert len(entries) == 10 and all("secret" not in entry.image for entry in entries)


def test_captions_that_are_no_clean_text(tmp_path):
    (tmp_path / "a.png").write_bytes(pictures.png(0))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "b.png").write_bytes(pictures.png(1))
    (tmp_path / "b.json").write_text('{"caption": "a \\ud800 half"}')
    (tmp_path / "c.png").write_bytes(pictures.png(2))
    (tmp_path / "c.json").write_text("[" * 100_000)
    (tmp_path / "d.png").write_bytes(pictures.png(3))
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfwith a mark\r\n\r\n")
    a, b, c, d = listed(opened(tmp_path))
    assert a.problem[0] == c.problem[0] == "unreadable"
    assert b.captions == ("a ? half",) and d.captions == ("with a mark",)


def test_archives_that_are_cut_or_of_other_members(tmp_path):
    folder = pictures.write_tars(tmp_path / "tars", 12)
    whole = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(whole[: len(whole) // 2])
    with tarfile.open(folder / "2.tar", "w") as archive:
        link = tarfile.TarInfo("away.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("away.txt"))
    entries = listed(opened(folder))
    problems = {entry.id: entry.problem for entry in entries if entry.problem}
    assert any("archive" in detail for _, detail in problems.values())
    assert problems["2.tar/away"][0] == "unreadable"
    assert sum(not entry.problem for entry in entries) >= 4


@pytest.mark.parametrize(
    ("kind", "reads"),
    [
        ("parquet", (pyarrow.parquet.ParquetFile, "read_row_group")),
        ("tars", (tarfile.TarFile, "next")),
    ],
)
def test_what_may_pass_is_not_left_out(tmp_path, monkeypatch, kind, reads):
    """A storage that is away for a while ends the listing, which goes on later."""
    def away(*_):
        raise OSError(errno.EIO, "the storage is away")

    source = opened(pictures.WRITERS[kind](tmp_path / kind, COUNT))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="is away"):
        patch.setattr(*reads, away)
        list(source.items(source.chunks[0]))
    assert not any(one.problem for one in source.items(source.chunks[0]))


def test_rows_that_tfds_cannot_read(tmp_path):
    folder = pictures.write_tfds(tmp_path / "own", 12)
    file = folder / "own-train.array_record-00000-of-00001"
    data = bytearray(file.read_bytes())
    data[1000:2000] = bytes(1000)
    file.write_bytes(data)
    problems = [entry.problem for entry in listed(opened(folder)) if entry.problem]
    assert 0 < len(problems) < 12 and {reason for reason, _ in problems} == {"unreadable"}


def test_what_cannot_be_a_source(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "a.zip").write_bytes(b"x")
    (tmp_path / "a.parquet").write_bytes(b"x")
    pyarrow.parquet.write_table(pyarrow.table({"url": ["x"]}), tmp_path / "b.parquet")
    pictures.write_tfds(tmp_path / "own", 2)
    for path, words in {
        "empty": "holds no pictures", "empty.txt": "is empty", "a.zip": "no kind that can be read",
        "a.parquet": "whole Parquet file", "b.parquet": "it has url: give one with --caption",
        "gone/": "does not exist", "own:test": "no split 'test'; it has train",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            opened(tmp_path / path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="has no columns"):
        opened(tmp_path / "empty", caption="text")


def test_columns_of_other_names(tmp_path):
    images = [{"bytes": pictures.png(i), "path": None} for i in range(3)] + [None]
    table = pyarrow.table({"photo": images, "alt": ["a", "b", "c", "d"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    entries = listed(opened(tmp_path / "t.parquet", image="photo", caption="alt"))
    assert [entry.captions for entry in entries[:3]] == [("a",), ("b",), ("c",)]
    assert entries[3].problem == ("unreadable", "column 'photo' holds no bytes")


def test_sizes():
    assert sizes.buckets("96x64,64", 32) == ((96, 64), (64, 64))
    made = sizes.buckets("512", 32)
    assert (512, 512) in made and len(set(made)) == len(made) > 6
    for width, height in made:
        assert width % 32 == height % 32 == 0 and 0.5 <= width / height <= 2
        assert abs(width * height / 512**2 - 1) < 0.1 and (height, width) in made
    assert sizes.nearest((1000, 500), made) == max(made, key=lambda s: s[0] / s[1])
    with pytest.raises(UserError, match="--buckets has 'wide'"):
        sizes.buckets("wide", 32)


def test_kinds_of_pictures(tmp_path):
    def decoded(picture, size=(64, 64), **options):
        picture.save(tmp_path / "p.png", **options)
        return sizes.decode((tmp_path / "p.png").read_bytes(), size)

    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert decoded(clear).tolist() == np.full((64, 64, 3), 255).tolist()
    deep = Image.fromarray(np.full((64, 64), 0x80FF, np.uint16))
    assert set(np.unique(decoded(deep))) == {0x80}
    turned = Image.new("RGB", (64, 128))
    turned.paste("white", (0, 0, 64, 64))
    exif = Image.Exif()
    exif[sizes.ORIENTATION] = 6  # a quarter turn clockwise: the top is on the right
    found = decoded(turned, (128, 64), exif=exif)
    assert found[:, 64:].min() == 255 and found[:, :64].max() == 0
    assert sizes.measure((tmp_path / "p.png").read_bytes()) == (128, 64)
    with pytest.raises(ValueError, match="64x100000, too long"):  # 4 GB to cover the size
        decoded(Image.new("L", (64, 100_000)), (1024, 1024))


def test_plans_depend_on_the_listing_alone(tmp_path):
    source = opened(pictures.write_lines(tmp_path / "in" / "lines.jsonl", COUNT))
    work = epath.Path(tmp_path)
    for number in range(len(source.chunks)):
        index.write_chunk(work, source, number, 64)
    plan = index.plan(work, len(source.chunks), ((96, 64), (64, 64), (64, 96)), 2)
    keys = [key for shard in plan.shards for key in shard.keys]
    assert len(set(keys)) == len(keys) and not set(keys) & plan.skipped.keys()
    assert {s.reason for s in plan.skipped.values()} == {
        "duplicate", "no caption", "too small", "unreadable"
    }
    for shard in plan.shards:
        assert len(shard.keys) <= 2 and list(shard.keys) == sorted(shard.keys)
        assert dataclasses.astuple(shard)[0] == sizes.name(shard.size)

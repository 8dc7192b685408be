"""Every form of source gives the same pictures and captions, and says what cannot be used."""

import dataclasses
import errno
import io
import json
import tarfile
import warnings

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


def test_lines_are_those_that_an_editor_shows(tmp_path):
    """Byte order marks, other systems' ends of lines, blanks; a separator within a prompt."""
    text = "\ufeffa fox\r\n\u3000\r\ufeff\na\u2028hen \n"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    found = [e.captions for e in listed(opened(tmp_path / "prompts.txt"))]
    assert found == [("a fox",), ("a\u2028hen",)]
    lines = ['{"prompt": "a fox"}', "", '{"prompt": "a\u2028hen"}']
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [e.captions for e in listed(opened(tmp_path / "p.jsonl"))] == found
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "a fox"}\n{"prompt": "\xe9"}'.encode("latin-1"))
    good, bad = listed(opened(tmp_path / "p.jsonl"))
    assert good.captions == ("a fox",) and bad.problem[0] == "unreadable"


ROWS = [  # fields, and the captions in them
    ({"caption": None, "text": "a cat"}, ("a cat",)),
    ({"caption": " \n", "text": "a cat"}, ("a cat",)),
    ({"caption": "a dog", "text": "a cat"}, ("a dog",)),
    ({"caption": None, "text": None}, ()),
]


def test_the_first_field_that_has_text(tmp_path):
    """In every form; as prompts too."""
    (tmp_path / "folder").mkdir()
    lines, members = [], {}
    for number, (fields, _) in enumerate(ROWS):
        members |= {f"{number}.png": pictures.png(number), f"{number}.json": json.dumps(fields)}
        lines.append(json.dumps({"file_name": f"folder/{number}.png"} | fields))
    for name, data in members.items():
        (tmp_path / "folder" / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    pack(tmp_path / "x.tar", tmp_path / "folder")
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    images = [members[f"{number}.png"] for number in range(len(ROWS))]
    columns = {key: [row.get(key) for row, _ in ROWS] for key in ("caption", "text")}
    empty = {"image_bytes": [images[0], None, None, None], "image": [None, *images[1:]]}
    pyarrow.parquet.write_table(pyarrow.table(columns | empty), tmp_path / "x.parquet")
    for name in ("folder", "x.tar", "x.jsonl", "x.parquet"):
        for wanted in (True, False):
            entries = listed(opened(tmp_path / name, wanted))
            assert [entry.captions for entry in entries] == [of for _, of in ROWS], name
            assert entries[3].problem[0] == "no caption"
            assert all(entry.image for entry in entries[:3]) == wanted


def pack(file, folder) -> None:
    """A tar of a folder's files."""
    with tarfile.open(file, "w") as archive:
        for member in sorted(folder.rglob("*")):
            archive.add(member, str(member.relative_to(folder)), recursive=False)


BESIDE = {  # names of files, and by picture the file that has its captions
    ("a.png", "a.txt", "a.json"): {"a.png": "a.txt"},
    ("a.PNG", "a.TXT"): {"a.PNG": "a.TXT"},
    ("a.png", "a.caption"): {"a.png": "a.caption"},
    ("a.png", "a.png.txt"): {"a.png": "a.png.txt"},
    ("d.1/i.00.png", "d.1/i.00.txt", "d.1/i.01.png", "d.1/i.01.txt"): {
        "d.1/i.00.png": "d.1/i.00.txt", "d.1/i.01.png": "d.1/i.01.txt",
    },
    ("i.00.png", "i.01.txt"): {"i.00.png": None},
    ("v1.0 cat.png", "v1.0 dog.txt"): {"v1.0 cat.png": None},
    ("a.left.png", "a.right.png", "a.txt"): {"a.left.png": None, "a.right.png": None},
    ("a.png", "a.mask.png", "a.txt"): {"a.png": "a.txt", "a.mask.png": None},
    ("a.image.png", "a.words.txt"): {"a.image.png": "a.words.txt"},
    ("a.png", "a.long.txt", "a.short.txt"): {"a.png": None},
    ("a.png", "a.cls", "b.heic", "b.txt", "c.heic"): {"a.png": None},
}


@pytest.mark.parametrize("names", BESIDE, ids=" ".join)
def test_which_file_has_a_pictures_captions(tmp_path, names):
    """The same in folders and tars, and nothing is passed over."""
    for number, name in enumerate(names):
        file = tmp_path / "x" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(name) if name.endswith(".json") else name
        file.write_bytes(pictures.png(number) if name.lower().endswith("png") else text.encode())
    pack(tmp_path / "x.tar", tmp_path / "x")
    expected = BESIDE[names]
    files = {pictures.png(number): name for number, name in enumerate(names)}
    both = []
    for path in (tmp_path / "x", tmp_path / "x.tar"):
        source = opened(path)
        entries = listed(source)
        found = {files[source.read(e.place)]: e.captions[0] for e in entries if not e.problem}
        assert found == {name: text for name, text in expected.items() if text}
        assert len({entry.id for entry in entries}) == len(entries)
        both.append(sorted(entry.problem for entry in entries if entry.problem))
        told = " ".join(entry.id for entry in entries)
        assert all(name.partition(".")[0] in told for name in names)
    assert both[0] == both[1]
    assert len(both[0]) >= len([name for name in expected if not expected[name]])


def test_blank_captions_beside_others(tmp_path):
    (tmp_path / "a.png").write_bytes(pictures.png(0))
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "a.json").write_text('{"caption": "a cat"}')
    assert [entry.captions for entry in listed(opened(tmp_path))] == [("a cat",)]


def test_a_name_that_comes_twice_in_a_tar(tmp_path):
    (tmp_path / "a.png").write_bytes(pictures.png(0))
    (tmp_path / "a.txt").write_text("a cat")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a.png", "a.txt", "a.txt"):
            archive.add(tmp_path / name, name)
    good, again = listed(opened(tmp_path / "x.tar"))
    assert good.captions == ("a cat",) and again.problem[1] == "a file of this name came before"


def test_pictures_under_other_names_are_no_prompts(tmp_path):
    (tmp_path / "a.png").write_bytes(pictures.png(0))
    file = tmp_path / "x.jsonl"
    file.write_text('{"image_path": "a.png", "caption": "a cat", "alt": "b"}\n')
    with pytest.raises(UserError, match="are under image_path: give one with --image-column"):
        opened(file)
    with pytest.raises(UserError, match="no pictures under photo; .* under image_path"):
        opened(file, image="photo")
    with pytest.raises(UserError, match="it has image_path, caption, alt: give .*--caption-column"):
        opened(file, caption="words")
    [entry] = listed(opened(file, image="image_path"))
    assert entry.size == sizes.measure(pictures.png(0))
    assert not opened(file, wanted=False).pictures


def test_shards_with_their_descriptions(tmp_path):
    """As img2dataset writes them: tars or folders, beside tables without pictures and figures."""
    tars = pictures.write_tars(tmp_path / "tars", COUNT)
    before = listed(opened(tars))
    for number in (0, 1):
        table = pyarrow.table({"url": ["x"], "caption": ["y"], "status": ["success"]})
        for folder in (tmp_path / "tars", tmp_path / "files"):
            folder.mkdir(exist_ok=True)
            pyarrow.parquet.write_table(table, folder / f"{number}.parquet")
            (folder / f"{number}_stats.json").write_text("{}")
        (tmp_path / "files" / f"{number}").mkdir()
        (tmp_path / "files" / f"{number}" / "a.png").write_bytes(pictures.png(number))
        (tmp_path / "files" / f"{number}" / "a.txt").write_text("a cat")
    assert listed(opened(tars)) == before
    assert [e.id for e in listed(opened(tmp_path / "files"))] == ["0/a.png", "1/a.png"]


def test_files_that_a_folders_form_leaves_out(tmp_path):
    tars = pictures.write_tars(tmp_path / "tars", COUNT)
    (tars / "2.tar.gz").write_bytes(b"x")
    (tars / "cat.png").write_bytes(pictures.png(0))
    (tars / "more").mkdir()
    with pytest.warns(UserWarning, match="2 others are left out, as cat.png"):
        entries = listed(opened(tars))
    assert entries[-1].id == "2.tar.gz/*" and "unpack" in entries[-1].problem[1]
    pictures.write_parquet(tmp_path / "parquet", COUNT).joinpath("0.parquet").rename(
        tars / "x.parquet"
    )
    with pytest.raises(UserError, match="holds x.parquet and 0.tar: give a folder of either"):
        opened(tars)


def test_paths_to_give_instead(tmp_path):
    """Hugging Face's folders: pictures with a list, and tables one level below."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "logo.png").write_bytes(pictures.png(0))
    pictures.write_parquet(tmp_path / "hub" / "data", COUNT)
    with pytest.raises(UserError, match=r"holds data/0.parquet: give \S+/hub/data, or"):
        opened(tmp_path / "hub")
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "images" / "train" / "a.png").write_bytes(pictures.png(0))
    listing = tmp_path / "images" / "train" / "metadata.jsonl"
    listing.write_text('{"file_name": "a.png", "text": "a cat"}\n')
    for folder in (tmp_path / "images", tmp_path / "images" / "train"):
        with pytest.raises(UserError, match=r"metadata.jsonl: give \S+/train/metadata.jsonl"):
            opened(folder)
    assert [e.captions for e in listed(opened(listing))] == [("a cat",)]
    listing.rename(listing.with_suffix(".csv"))
    with pytest.raises(UserError, match="write it as JSON lines"):
        opened(tmp_path / "images")


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


def test_lines_of_other_kinds_are_told_with_their_number(tmp_path):
    (tmp_path / "a.png").write_bytes(pictures.png(0))
    lines = [
        {"image": "a.png", "caption": "a fox"}, {"caption": "no picture"}, ["a.png"], "a fox",
        {"image": "a.png", "captions": ["a", 5]}, {"image": "a.png", "captions": ["a", None]},
    ]
    (tmp_path / "x.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    entries = listed(opened(tmp_path / "x.jsonl"))
    assert [entry.captions for entry in entries if not entry.problem] == [("a fox",), ("a",)]
    assert [entry.problem for entry in entries if entry.problem] == [
        ("unreadable", "x.jsonl line 3 names no picture"),
        ("unreadable", "x.jsonl line 5 is no JSON object"),
        ("unreadable", "x.jsonl line 7 is no JSON object"),
        ("unreadable", "x.jsonl line 9, its caption: 5 is no text"),
    ]


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


def test_captions_in_a_storage_that_is_away_are_not_left_out(tmp_path, monkeypatch):
    source = opened(pictures.write_folder(tmp_path / "in", COUNT))

    def away(name):
        raise OSError(errno.EIO, "the storage is away")

    monkeypatch.setattr(source, "read", away)
    with pytest.raises(OSError, match="is away"):
        listed(source)


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
    (tmp_path / "none.jsonl").write_text('\n"a fox"\n[1]\n')
    (tmp_path / "a.zip").write_bytes(b"x")
    (tmp_path / "a.parquet").write_bytes(b"x")
    pyarrow.parquet.write_table(pyarrow.table({"url": ["x"]}), tmp_path / "b.parquet")
    pictures.write_tfds(tmp_path / "own", 2)
    for path, words in {
        "empty": "holds no pictures", "empty.txt": "is empty", "a.zip": "no kind that can be read",
        "a.parquet": "whole Parquet file", "b.parquet": "it has url: give one with --caption",
        "none.jsonl": "none.jsonl line 2 is no JSON object: write one a line",
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
    with pytest.raises(UserError, match="'wide' is no size; give pixels"):
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


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_what_is_measured_is_decoded(kind, orientation):
    """A picture of two halves, cut at nothing: its size, upright, is the one it was listed with."""
    picture = Image.new("L", (64, 128))
    picture.paste(255, (0, 0, 64, 64))
    exif = Image.Exif()
    exif[sizes.ORIENTATION] = orientation
    file = io.BytesIO()
    picture.convert("RGB").save(file, kind, exif=exif)
    size = sizes.measure(file.getvalue())
    assert size == ((128, 64) if orientation in range(5, 9) else (64, 128))
    found = sizes.decode(file.getvalue(), size)[..., 0] > 128
    first, second = np.split(found, 2, axis=int(size == (128, 64)))
    white, black = (second, first) if orientation in (3, 4, 6, 7) else (first, second)
    assert white.mean() > 0.9 and black.mean() < 0.1


def test_warnings_name_the_picture(tmp_path):
    for name in ("a", "b"):
        exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0"  # ends early
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.jpg", exif=exif)
        (tmp_path / f"{name}.txt").write_text(name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        source = opened(tmp_path)
        index.write_chunk(epath.Path(tmp_path / "work"), source, 0, 64)
    found = sorted(str(warning.message) for warning in told)
    assert [text.split(":")[0] for text in found] == ["a.jpg", "b.jpg"]
    assert all("EXIF" in text for text in found)


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

"""tools/emoji.py on small archives of the packages' layout."""

import importlib.util
import io
import json
import pathlib
import sys
import tarfile

import pytest
from PIL import Image

from twinflow_jax.errors import UserError

FILE = pathlib.Path(__file__).parents[1] / "tools" / "emoji.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("emoji_tool", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["emoji_tool"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def entry(code, label, group=4, tags=(), tone=False):
    first, _, rest = code.partition("-")
    skin = {"hexcode": f"{first}-1F3FB-{rest}", "label": f"{label}: light skin tone"}
    skins = [skin] if tone else []
    return {"hexcode": code, "label": label, "group": group, "tags": list(tags), "skins": skins}


DATA = [
    entry("1F34E", "red apple", tags=["fruit", "red"]),
    entry("2764-FE0F", "red heart"),
    entry("1F9D1-200D-1F373", "cook", 1, tone=True),
    entry("1F468-200D-1F373", "man cook", 1, tone=True),
    entry("1F3FB", "light skin tone", 2),
    entry("1F1E6-1F1E8", "flag: Ascension Island", 9),
    entry("1F46A", "family: adult, child", 1),
    {"hexcode": "1F1E6", "label": "regional indicator A"},
]
CODES = (
    "1f34e", "2764-fe0f", "1f9d1-200d-1f373", "1f468-200d-1f373", "1f468-1f3fb-200d-1f373",
    "1f3fb", "1f1e6-1f1e8", "1f46a", "1f1e6", "1f9d1-1f3fb-200d-1f373",
)


def picture(mode="RGBA", size=(64, 64), color=(0, 0, 0, 0), form="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, form)
    return buffer.getvalue()


def write_archive(path, contents, links=()):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)


@pytest.fixture
def archives(tool, tmp_path):
    """Two styles draw everything, the third one only the apple, and not square."""
    folder = tmp_path / "archives"
    folder.mkdir()
    write_archive(folder / tool.NAMES.archive, {"package/en/data.json": json.dumps(DATA).encode()})
    for style in ("google", "twitter"):
        package = tool.STYLES[style]
        contents = {f"{package.pictures}{code}.png": picture() for code in CODES}
        contents |= {
            f"{package.pictures}../../../../escaped.png": b"", f"/{package.pictures}1f34f.png": b"",
        }
        write_archive(
            folder / package.archive, contents, [(f"{package.pictures}1f34f.png", "/etc/passwd")]
        )
    package = tool.STYLES["3d"]
    tall = picture(size=(32, 64), color=(255, 0, 0, 255), form="WEBP")
    write_archive(folder / package.archive, {f"{package.pictures}1f34e.webp": tall})
    return folder


def run(tool, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["emoji.py", *map(str, arguments)])
    tool.main()


def test_the_set(tool, archives, tmp_path, monkeypatch):
    target = tmp_path / "set"
    run(tool, monkeypatch, target, "--archives", archives, "--size", 16)
    lines = {s: (target / f"{s}.jsonl").read_text().splitlines() for s in tool.SPLITS}
    records = {r["id"]: (split, r) for split in lines for r in map(json.loads, lines[split])}
    drawn = {"1f34e", "2764", *(code for code in CODES if "1f373" in code)}
    assert set(records) == {f"{s}/{c}" for s in ("google", "twitter") for c in drawn} | {"3d/1f34e"}
    assert {str(p.relative_to(target)) for p in target.glob("images/*/*")} == {
        record["image"] for _, record in records.values()
    }
    for _, record in records.values():
        with Image.open(target / record["image"]) as image:
            assert image.size == (16, 16) and image.mode == "RGB"
            assert image.getpixel((0, 8)) == (255, 255, 255)
    with Image.open(target / "images/3d/1f34e.png") as image:
        red, green, _ = image.getpixel((8, 8))
        assert red > 200 and green < 50
    assert records["3d/1f34e"][1]["captions"] == [
        "red apple, 3d emoji", "3d emoji of red apple", "red apple, fruit, 3d emoji",
    ]
    assert records["google/1f9d1-1f3fb-200d-1f373"][1]["captions"][0] == (
        "cook, light skin, google emoji"
    )
    assert "CC-BY 4.0" in (target / "ATTRIBUTION.txt").read_text()


def test_a_concept_is_held_out_whole(tool, archives):
    found = tool.emoji(tool.epath.Path(archives) / tool.NAMES.archive)
    assert {one.concept for code, one in found.items() if "1f373" in code} == {"cook"}
    styles = set(tool.STYLES)
    splits = {
        f"concept {i}": [tool.split_of(f"concept {i}", style, styles) for style in sorted(styles)]
        for i in range(2000)
    }
    whole = [s for s in splits.values() if "held_out_concepts" in s]
    pairs = [s for s in splits.values() if "held_out_pairs" in s]
    assert all(len(set(s)) == 1 for s in whole)
    assert all(s.count("train") == 2 for s in pairs)
    assert abs(len(whole) / 2000 - tool.CONCEPTS) < 0.02
    assert abs(len(pairs) / 6000 - tool.PAIRS) < 0.015
    # A concept that one style draws alone cannot be held out as a pair.
    assert all(tool.split_of(f"concept {i}", "3d", {"3d"}) != "held_out_pairs" for i in range(2000))


def test_bad_input_is_one_line(tool, archives, tmp_path, monkeypatch):
    def refused(match, *arguments):
        with pytest.raises(UserError, match=match) as error:
            run(tool, monkeypatch, tmp_path / "new", *arguments)
        assert "\n" not in str(error.value) and not (tmp_path / "new").exists()

    refused("--size is 128", "--size", 128)
    google = archives / tool.STYLES["google"].archive
    whole = google.read_bytes()
    google.write_bytes(whole[: len(whole) // 2])
    refused("cannot be read", "--archives", archives)
    google.unlink()
    refused("is missing", "--archives", archives)
    pictures = tool.STYLES["google"].pictures
    write_archive(google, {f"{pictures}1f34e.png": b"no picture"})
    refused("google 1f34e cannot be read", "--archives", archives)
    write_archive(google, {"package/README.md": b""})
    refused("does not hold", "--archives", archives)
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("npm is not installed")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network down' >&2\nexit 1\n")
    npm.chmod(0o755)
    refused(r"failed \(network down\)")

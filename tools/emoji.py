"""A captioned set of about 10,000 emoji: python tools/emoji.py DST

Three styles (Google's Noto, Twitter's Twemoji, Microsoft's Fluent 3D) with the names and tags of
emojibase, from npm packages. Written for twinflow encode:

    DST/train.jsonl
    DST/held_out_concepts.jsonl   concepts that no training picture shows, in any style
    DST/held_out_pairs.jsonl      concepts that training pictures show in the other styles only
    DST/images/STYLE/CODE.png     on white
    DST/ATTRIBUTION.txt           whose work it is; show it where you show the pictures

A concept is an emoji with all its skin tones, genders and directions. Which are held out depends
on their names alone, so that it is the same for everybody.
"""

import collections
import dataclasses
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator

from etils import epath
from PIL import Image

from twinflow_jax import files, images
from twinflow_jax.errors import Parser, UserError, run_verb


@dataclasses.dataclass(frozen=True)
class Package:
    """An npm package. pictures: the folder in it that holds CODE.png or CODE.webp."""

    name: str
    version: str
    credit: str
    pictures: str = ""

    @property
    def archive(self) -> str:
        """The file that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


NAMES = Package(
    "emojibase-data", "17.0.0",
    "Names and tags: emojibase by Miles Johnson, MIT license, https://emojibase.dev",
)
STYLES = {  # the word in captions
    "google": Package(
        "emoji-datasource-google", "16.0.0",
        "images/google: Noto Emoji, Copyright Google, Apache License 2.0, "
        "https://github.com/googlefonts/noto-emoji",
        "package/img/google/64/",
    ),
    "twitter": Package(
        "emoji-datasource-twitter", "16.0.0",
        "images/twitter: Twemoji, Copyright Twitter, Inc and other contributors, CC-BY 4.0 "
        "(https://creativecommons.org/licenses/by/4.0/), https://github.com/jdecked/twemoji",
        "package/img/twitter/64/",
    ),
    "3d": Package(
        "@lobehub/fluent-emoji-3d", "1.1.0",
        "images/3d: Fluent Emoji, Copyright Microsoft, MIT license, "
        "https://github.com/microsoft/fluentui-emoji, packaged by LobeHub, MIT license",
        "package/assets/",
    ),
}
SPLITS = ("train", "held_out_concepts", "held_out_pairs")
CONCEPTS, PAIRS = 0.08, 0.05  # shares held out
COMPONENTS, FLAGS = 2, 9  # emojibase's groups that are left out
PIXELS = 64  # of two of the styles
LARGEST = 20_000_000  # bytes of a file in an archive that is read

MAN, WOMAN, PERSON = "1f468", "1f469", "1f9d1"
# Skin tones, the signs of gender, "facing right", and what joins them.
MODIFIERS = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "2640", "2642", "27a1", "200d", "fe0f"}
PEOPLE = {"man", "woman", "person", "men", "women", "people", "and"}


@dataclasses.dataclass(frozen=True)
class Emoji:
    """name: in words. concept: equal for all tones, genders and directions of an emoji."""

    name: str
    tags: tuple[str, ...]
    concept: str


def main() -> None:
    parser = Parser(prog="python tools/emoji.py", description=__doc__)
    parser.add_argument("target", type=files.path, metavar="DST")
    parser.add_argument("--size", type=int, default=PIXELS, help=f"pixels (default {PIXELS})")
    parser.add_argument(
        "--archives", type=files.path, metavar="FOLDER",
        help="of the packages' .tgz files, as `npm pack` names them, in place of a network",
    )
    args = parser.parse_args()
    if not 8 <= args.size <= PIXELS:
        raise UserError(f"--size is {args.size}; the pictures allow 8 to {PIXELS}")
    if args.archives:
        counts = build(epath.Path(args.archives), args.target, args.size)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for package in (NAMES, *STYLES.values()):
                download(package, folder)
            counts = build(epath.Path(folder), args.target, args.size)
    print("  ".join(f"{head:>18}" for head in ("", *SPLITS)))
    for style in STYLES:
        print("  ".join(f"{cell:>18}" for cell in (style, *(counts[s, style] for s in SPLITS))))
    print(f"{counts.total()} pictures are in {args.target}; credits in ATTRIBUTION.txt")


def download(package: Package, folder: str) -> None:
    """Gets a package's archive with npm.

    Raises:
      UserError: npm is missing or fails.
    """
    wanted = f"{package.name}@{package.version}"
    print(f"{wanted}: downloading", flush=True)
    try:
        done = subprocess.run(
            ["npm", "pack", wanted, "--pack-destination", folder, "--silent"],
            capture_output=True, text=True,
        )
    except FileNotFoundError as error:
        raise UserError(
            "npm is not installed: install Node.js, or give --archives with the packages"
        ) from error
    if done.returncode:
        # What npm says itself names its log files last and the reason before them.
        said = re.findall(r"npm (?:ERR!|error) (.*)", done.stderr) or ["no reason given"]
        raise UserError(
            f"npm pack {wanted} failed ({said[0]}): check the network, or give --archives"
        )


def build(archives: epath.Path, target: epath.PathLike, size: int) -> collections.Counter:
    """Writes the set; returns pictures by (split, style).

    Raises:
      UserError: an archive is missing or damaged, or DST cannot be written.
    """
    found = emoji(archives / NAMES.archive)
    drawn = {
        style: {code: data for code, data in pictures(archives, package) if code in found}
        for style, package in STYLES.items()
    }
    styles_of = collections.defaultdict(set)  # of each concept
    for style, codes in drawn.items():
        for code in codes:
            styles_of[found[code].concept].add(style)
    lines, counts = collections.defaultdict(list), collections.Counter()
    target = epath.Path(target)
    with files.whole_folder(target, needed=100_000_000):
        for style, codes in drawn.items():
            folder = target / "images" / style
            folder.mkdir(parents=True)
            for code, data in sorted(codes.items()):
                one = found[code]
                split = split_of(one.concept, style, styles_of[one.concept])
                (folder / f"{code}.png").write_bytes(on_white(data, size, f"{style} {code}"))
                record = {
                    "id": f"{style}/{code}", "image": f"images/{style}/{code}.png",
                    "captions": captions(one, style),
                }
                lines[split].append(json.dumps(record) + "\n")
                counts[split, style] += 1
        for split in SPLITS:
            (target / f"{split}.jsonl").write_text("".join(lines[split]))
        (target / "ATTRIBUTION.txt").write_text(attribution())
    return counts


def emoji(archive: epath.Path) -> dict[str, Emoji]:
    """By code: emojibase's hexcodes in lower case without variation selectors.

    Without flags, components (a skin tone or a letter alone), and families, which newer sets
    draw as grey signs.
    """
    (_, data), = members(archive, lambda name: name == "package/en/data.json")
    try:
        bases = [
            entry for entry in json.loads(data)
            if entry.get("group") not in (None, COMPONENTS, FLAGS)
            and not entry["label"].startswith("family")
        ]
        names = {_plain(entry["hexcode"]): entry["label"] for entry in bases}
        found = {}
        for base in bases:
            label = names.get(_plain(base["hexcode"]), base["label"])
            words = [w for w in re.findall(r"[^\s:,]+", label.lower()) if w not in PEOPLE]
            concept = " ".join(words) or "person"
            for entry in (base, *base.get("skins", ())):
                name = entry["label"].replace(":", ",").replace("skin tone", "skin")
                code = entry["hexcode"].lower().replace("-fe0f", "")
                found[code] = Emoji(name.lower(), tuple(base.get("tags", ())), concept)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{archive}: package/en/data.json cannot be read ({error!r})") from error
    return found


def _plain(hexcode: str) -> str:
    """The code of an emoji without tone, gender and direction: "man cook" is then "cook"."""
    codes = [code for code in hexcode.lower().split("-") if code not in MODIFIERS]
    return "-".join(PERSON if code in (MAN, WOMAN) else code for code in codes)


def pictures(archives: epath.Path, package: Package) -> Iterator[tuple[str, bytes]]:
    """(code, file) of a package's pictures, codes spelled as `emoji` does."""
    pattern = re.compile(re.escape(package.pictures) + r"([0-9a-f-]+)\.(png|webp)")
    for name, data in members(archives / package.archive, pattern.fullmatch):
        yield pattern.fullmatch(name)[1].replace("-fe0f", ""), data


def members(archive: epath.Path, wanted) -> list[tuple[str, bytes]]:
    """(name, contents) of an archive's plain files that are wanted, read and never extracted.

    Raises:
      UserError: the archive is missing, damaged, or has none of them.
    """
    found = []
    try:
        with archive.open("rb") as file, tarfile.open(fileobj=file, mode="r:gz") as tar:
            for member in tar:
                if member.isreg() and wanted(member.name) and member.size <= LARGEST:
                    found.append((member.name, tar.extractfile(member).read()))
    except FileNotFoundError as error:
        raise UserError(f"{archive} is missing: get it with npm pack") from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive} cannot be read ({error}): download it again") from error
    if not found:
        raise UserError(f"{archive} does not hold what is expected: download it again")
    return found


def share(*names: str) -> float:
    """A number in [0, 1) that is drawn from the names alone."""
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(concept: str, style: str, drawn: set[str]) -> str:
    """Where a picture belongs. drawn: the styles that the concept is drawn in."""
    if share("concept", concept) < CONCEPTS:
        return "held_out_concepts"
    if len(drawn) > 1 and share("pair", concept) < PAIRS * len(drawn):
        out = sorted(drawn)[int(share("style", concept) * len(drawn))]  # one style at most
        return "held_out_pairs" if style == out else "train"
    return "train"


def captions(one: Emoji, style: str) -> list[str]:
    """Short captions; all of them say the style, the first one only that and the name."""
    known = set(re.findall(r"\w+", one.name))
    tags = sorted((t for t in one.tags if t not in known), key=lambda t: share("tag", t, one.name))
    texts = [f"{one.name}, {style} emoji", f"{style} emoji of {one.name}"]
    for pair in (tags[:2], tags[2:4]):
        if pair:
            texts.append(f"{one.name}, {', '.join(pair)}, {style} emoji")
    return texts


def on_white(data: bytes, size: int, name: str) -> bytes:
    """A picture as a square PNG without transparency.

    Raises:
      UserError: it cannot be decoded.
    """
    try:
        picture = images.opened(data).convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be read ({error}): download the packages again") from error
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    buffer = io.BytesIO()
    square.convert("RGB").resize((size, size), Image.Resampling.LANCZOS).save(buffer, "PNG")
    return buffer.getvalue()


def attribution() -> str:
    credits = [package.credit for package in (NAMES, *STYLES.values())]
    note = "The pictures were put on white and scaled. Credit their authors where you show them."
    return "\n".join((*credits, note)) + "\n"


if __name__ == "__main__":
    run_verb(main)

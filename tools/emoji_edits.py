"""Edits of the emoji that tools/emoji.py wrote: python tools/emoji_edits.py SET

    SET/edits.jsonl            of the pictures in train.jsonl
    SET/edits_held_out.jsonl   of those in held_out_concepts.jsonl
    SET/changed/NAME/STYLE/CODE.png

Written for twinflow encode: each picture is mirrored and has its colours changed in one of three
ways, one of eight is drawn in one other style, and a figure gets each of three skin tones from none
and from the others, as it is and mirrored, where the set has such pictures. Which way and style
depends on names alone.

What can't be seen at 32 pixels is left out: edits that change less than LEAST there, and two of
Unicode's five skin tones, since neighbours differ by less than a small network is wrong by. Few
edits are of styles, of which the source does not say enough: their losses would drown the others.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from twinflow_jax import files, images
from twinflow_jax.errors import Parser, UserError, run_verb

SPLITS = {"train": "edits", "held_out_concepts": "edits_held_out"}
STYLES = {"google": "Google's", "twitter": "Twitter's", "3d": "a 3d"}
TONES = {"1f3fb": "light", "1f3fd": "medium", "1f3ff": "dark"}
SIDE, LEAST = 32, 0.01  # pixels, and the mean square that an edit changes there at least
Change = tuple[str, Callable[[Image.Image], Image.Image]]  # an instruction, what it does
COLOURS: dict[str, Change] = {
    "inverted": ("invert its colours", ImageOps.invert),
    "grey": ("draw it in black and white", lambda picture: picture.convert("L").convert("RGB")),
    "turned": (
        "exchange red and blue", lambda picture: Image.fromarray(np.asarray(picture)[..., ::-1])
    ),
}
CHANGES: dict[str, Change] = {"mirrored": ("mirror it", ImageOps.mirror)} | COLOURS
Edits = Iterator[tuple[str, str, str]]  # instruction, source, target: files in the set's folder


def main() -> None:
    parser = Parser(prog="python tools/emoji_edits.py", description=__doc__)
    parser.add_argument("folder", type=files.path, metavar="SET")
    folder = epath.Path(parser.parse_args().folder)
    for split, name in SPLITS.items():
        file = folder / f"{split}.jsonl"
        if not file.exists():
            raise UserError(f"{file} is missing: write the set with tools/emoji.py")
        known = {row["id"]: row["image"] for row in map(json.loads, file.read_text().splitlines())}
        small = shrunk(folder)
        every = [*changed(folder, known), *styles(known), *tones(known)]
        edits = [
            (said, source, target) for said, source, target in every
            if np.square(small(source) - small(target)).mean() > LEAST
        ]
        rows = (
            {"id": f"{source}>{number}", "instruction": said, "source": source, "target": target}
            for number, (said, source, target) in enumerate(edits)
        )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        files.write(folder / f"{name}.jsonl", lines.encode())
        print(f"{len(edits):,} edits are in {folder / name}.jsonl; "
              f"{len(every) - len(edits):,} that hardly show are left out")


def one_of(choices: Sequence, name: str):
    """The same one for a name, always."""
    return choices[int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % len(choices)]


def opened(folder: epath.Path, file: str) -> Image.Image:
    return images.opened((folder / file).read_bytes()).convert("RGB")


def shrunk(folder: epath.Path) -> Callable[[str], np.ndarray]:
    """`file -> (SIDE, SIDE, 3)` in [-1, 1], read once."""

    @functools.cache
    def small(file: str) -> np.ndarray:
        little = opened(folder, file).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return np.asarray(little, np.float32) / 127.5 - 1

    return small


def changed_file(name: str, into: str) -> str:
    """Where the picture of that name is, changed into one of CHANGES."""
    return f"changed/{into}/{name}.png"


def styles(known: dict[str, str]) -> Edits:
    """Of one picture of eight the same emoji in another style. known: files of pictures by id."""
    for name, source in known.items():
        if one_of(range(8), f"{name} in another style"):
            continue
        style, _, code = name.partition("/")
        there = [other for other in STYLES if other != style and f"{other}/{code}" in known]
        if there:
            other = one_of(there, name)
            yield f"draw it in {STYLES[other]} style", source, known[f"{other}/{code}"]


def tones(known: dict[str, str]) -> Edits:
    """Of each picture with one skin tone: from the one without, and from each with another; and of
    their mirror images, which changed() writes."""
    for name, target in known.items():
        found = [part for part in name.partition("/")[2].split("-") if part in TONES]
        if len(found) != 1:
            continue
        [tone] = found
        said = f"give it {TONES[tone]} skin"
        before = [name.replace(f"-{tone}", "")]
        before += [name.replace(tone, other) for other in TONES if other != tone]
        for source in (other for other in before if other in known):
            yield said, known[source], target
            yield said, changed_file(source, "mirrored"), changed_file(name, "mirrored")


def changed(folder: epath.Path, known: dict[str, str]) -> Edits:
    """Of each picture its mirror image, and one in other colours, which are written."""
    for name, source in known.items():
        picture = opened(folder, source)
        for into in ("mirrored", one_of(list(COLOURS), name)):
            said, change = CHANGES[into]
            target = changed_file(name, into)
            files.write(folder / target, images.png(change(picture)))
            yield said, source, target


if __name__ == "__main__":
    run_verb(main)

"""Edits of the emoji that tools/emoji.py wrote: python tools/emoji_edits.py SET

    SET/edits.jsonl            of the pictures in train.jsonl
    SET/edits_held_out.jsonl   of those in held_out_concepts.jsonl
    SET/changed/NAME/STYLE/CODE.png

Written for twinflow encode: a picture is mirrored or has its colours changed in one of three ways,
one of eight is drawn in one other style, and a figure gets each of three skin tones from none and
from the others, where the set has such pictures. Which way and style depends on names alone.

Of Unicode's five skin tones, neighbours differ by less at 32 pixels than a small network is wrong
by: light, medium and dark are kept. Few edits are of styles, of which the source does not say
enough: their losses would drown the others.
"""

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
Change = tuple[str, Callable[[Image.Image], Image.Image]]  # an instruction, what it does
COLOURS: dict[str, Change] = {
    "inverted": ("invert its colours", ImageOps.invert),
    "grey": ("draw it in black and white", lambda picture: picture.convert("L").convert("RGB")),
    "turned": (
        "exchange red and blue", lambda picture: Image.fromarray(np.asarray(picture)[..., ::-1])
    ),
}
CHANGES: dict[str, Change] = {"mirrored": ("mirror it", ImageOps.mirror)} | COLOURS


def main() -> None:
    parser = Parser(prog="python tools/emoji_edits.py", description=__doc__)
    parser.add_argument("folder", type=files.path, metavar="SET")
    folder = epath.Path(parser.parse_args().folder)
    for split, name in SPLITS.items():
        file = folder / f"{split}.jsonl"
        if not file.exists():
            raise UserError(f"{file} is missing: write the set with tools/emoji.py")
        known = {row["id"]: row["image"] for row in map(json.loads, file.read_text().splitlines())}
        edits = [*styles(known), *tones(known), *changed(folder, known)]
        rows = (
            {"id": f"{source}>{number}", "instruction": said, "source": source, "target": target}
            for number, (said, source, target) in enumerate(edits)
        )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        files.write(folder / f"{name}.jsonl", lines.encode())
        print(f"{len(edits):,} edits are in {folder / name}.jsonl")


Edits = Iterator[tuple[str, str, str]]  # instruction, source, target


def one_of(choices: Sequence, name: str):
    """The same one for a name, always."""
    return choices[int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % len(choices)]


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
    """Of each picture with one skin tone: from the one without, and from each with another."""
    for name, target in known.items():
        found = [part for part in name.partition("/")[2].split("-") if part in TONES]
        if len(found) != 1:
            continue
        [tone] = found
        said = f"give it {TONES[tone]} skin"
        if source := known.get(name.replace(f"-{tone}", "")):
            yield said, source, target
        others = (name.replace(tone, other) for other in TONES if other != tone)
        for source in (known[other] for other in others if other in known):
            yield said, source, target


def changed(folder: epath.Path, known: dict[str, str]) -> Edits:
    """Of each picture its mirror image, or one in other colours, which is written."""
    for name, source in known.items():
        picture = images.opened((folder / source).read_bytes()).convert("RGB")
        into = one_of(list(COLOURS), name)
        if one_of(range(2), f"{name} in other colours"):
            into = "mirrored"
        said, change = CHANGES[into]
        target = f"changed/{into}/{name}.png"
        files.write(folder / target, images.png(change(picture)))
        yield said, source, target


if __name__ == "__main__":
    run_verb(main)

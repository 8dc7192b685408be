"""Edits of the emoji that tools/emoji.py wrote: python tools/emoji_edits.py SET

    SET/edits.jsonl            of the pictures in train.jsonl
    SET/edits_held_out.jsonl   of those in held_out_concepts.jsonl
    SET/changed/NAME/STYLE/CODE.png

Written for twinflow encode. An edit draws an emoji in another style, gives it a skin tone, mirrors
it or changes its colours. Which of these a picture gets depends on its name alone.
"""

import hashlib
import json
from collections.abc import Iterator

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from twinflow_jax import files, images
from twinflow_jax.errors import Parser, UserError, run_verb

SPLITS = {"train": "edits", "held_out_concepts": "edits_held_out"}
STYLES = {"google": "Google's", "twitter": "Twitter's", "3d": "a 3d"}
TONES = {
    "1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
CHANGES = {  # of colours, and the mirror: name, instruction, change
    "mirrored": ("mirror it", ImageOps.mirror),
    "inverted": ("invert its colours", ImageOps.invert),
    "grey": ("draw it in black and white", lambda picture: picture.convert("L").convert("RGB")),
    "turned": (
        "exchange red and blue", lambda picture: Image.fromarray(np.asarray(picture)[..., ::-1])
    ),
}


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


def styles(known: dict[str, str]) -> Edits:
    """Of each picture those of the same emoji in other styles. known: files of pictures by id."""
    for name, source in known.items():
        style, _, code = name.partition("/")
        for other, said in STYLES.items():
            if other != style and (target := known.get(f"{other}/{code}")):
                yield f"draw it in {said} style", source, target


def tones(known: dict[str, str]) -> Edits:
    """Of each picture without a skin tone those that have one."""
    for name, target in known.items():
        style, _, code = name.partition("/")
        parts = code.split("-")
        found = [part for part in parts if part in TONES]
        plain = "-".join(part for part in parts if part not in TONES)
        if len(found) == 1 and (source := known.get(f"{style}/{plain}")):
            yield f"give it {TONES[found[0]]} skin", source, target


def changed(folder: epath.Path, known: dict[str, str]) -> Edits:
    """Of each picture one that is mirrored or coloured, which is written."""
    for name, source in known.items():
        draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        kind = list(CHANGES)[draw % len(CHANGES)]
        said, change = CHANGES[kind]
        target = f"changed/{kind}/{name}.png"
        picture = images.opened((folder / source).read_bytes()).convert("RGB")
        files.write(folder / target, images.png(change(picture)))
        yield said, source, target


if __name__ == "__main__":
    run_verb(main)

"""The verb `sample` for checkpoints that edit pictures."""

import argparse
import itertools
from collections.abc import Iterator

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image

from twinflow_jax import arguments, files, images
from twinflow_jax.config import Run
from twinflow_jax.drawing import album, by_prompt, codec, denoising, editing, pictures
from twinflow_jax.drawing.conditions import Embeddings
from twinflow_jax.errors import UserError

NOT_HERE = ("prompts", "embeddings", "save_embeddings", "save_latents")


def sample(args: argparse.Namespace, run: Run | None) -> int:
    """Draws what the verb's arguments ask for; returns the exit status.

    run: the run whose transformer draws, where the checkpoint is one.
    """
    arguments.refuse(args, NOT_HERE, "a network that edits takes --image and --prompt, or --edits")
    if args.sheet:
        raise UserError("--sheet: edits have sizes of their own, and are written one by one")
    pipeline = by_prompt.pipeline_of(args, run)
    form, tile = pipeline.family.editing, codec.tile_of(pipeline, args.tile)
    area = editing.area_of(pipeline)
    edits = [editing.opened(form, *asked) for asked in read(args)]
    shapes = [
        denoising.latent_shape(pipeline, (args.size or form.size(edit.pictures, area))[::-1])
        for edit in edits
    ]
    ways = {shape: by_prompt.asked(args, pipeline, shape) for shape in dict.fromkeys(shapes)}
    count = 1 if args.count is None else args.count
    negative = ways[shapes[0]].settings.get("negative")
    editing.check(pipeline, edits, negative)
    conditions = list(editing.conditions(pipeline, edits, negative))
    out, pages, drawn = epath.Path(args.out), [], []
    drawn_by, restored = by_prompt.networks(pipeline), not (args.size or args.model_size)
    with pipeline.kept() as kept:
        for shape, which in groups(shapes, conditions):
            how = ways[shape]
            cond, null = (
                Embeddings.join(parts) if parts[0] else None
                for parts in zip(*(conditions[i] for i in which), strict=True)
            )
            told = by_prompt.settings(
                args, pipeline, shape, tile, how, drawn_by, restored=restored
            )
            owners, numbers = np.divmod(np.arange(len(which) * count), count)
            some = [
                album.Page(
                    f"{which[owner]:04d}_{by_prompt.plain(edits[which[owner]].instruction)}_"
                    f"{number:02d}_{how.label}_seed{args.seed}",
                    told | {"prompt": edits[which[owner]].instruction, "number": str(number),
                            "condition": cond.fingerprint(int(owner))},
                )
                for owner, number in zip(owners, numbers, strict=True)
            ]
            left = album.missing(out, some)
            own = [form.decides(edits[which[owner]].pictures).size for owner in owners[left]]
            made = pictures(
                kept, how.sampler, cond, owners[left], numbers[left], shape, args.seed, args.batch,
                null, tile,
            )
            if restored:
                made = map(resized, made, own)
            album.write(out, [some[i] for i in left], made)
            drawn += [len(pages) + at for at in left]
            pages += some
    print(album.summary(out, pages, drawn))
    for line in pipeline.clock.lines():
        print(line)
    return 0


def read(args: argparse.Namespace) -> list[tuple[str, list[str], str]]:
    """Instructions, each with the files of its pictures and the line of --edits, "" if given alone.

    Raises:
      UserError: not one of --image with --prompt and --edits, or no such lines; names the line.
    """
    if bool(args.edits) == bool(args.image) or bool(args.image) != bool(args.prompt):
        raise UserError("this network edits pictures: give --image and --prompt, or --edits")
    if args.image:
        return [(prompt, args.image, "") for prompt in args.prompt]
    file = epath.Path(args.edits)
    try:
        lines = files.text_lines(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"--edits {file} cannot be read ({error})") from error
    found = []
    for number, line in lines:
        where, row = f"--edits {file}, line {number}: ", files.parsed(line)
        names = row.get("images")
        if not isinstance(names, list) or not isinstance(row.get("prompt"), str):
            raise UserError(f'{where}write {{"images": ["in.png"], "prompt": "..."}}')
        if strange := [name for name in names if not files.inside(name)]:
            raise UserError(f"{where}{strange[0]!r} is no file in the folder of {file.name}")
        found.append((row["prompt"], [str(file.parent / name) for name in names], where))
    if not found:
        raise UserError(f"--edits {file} is empty: write one edit a line")
    return found


def groups(
    shapes: list[tuple[int, ...]], conditions: list[tuple[Embeddings, Embeddings | None]]
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Shapes, each with the edits of it whose references have the same shapes: one program's."""
    key = lambda i: (shapes[i], tuple(a.shape for a in conditions[i][0].references))
    for (shape, _), which in itertools.groupby(sorted(range(len(shapes)), key=key), key):
        yield shape, list(which)


def resized(picture: Float[np.ndarray, "H W 3"], size: tuple[int, int]) -> np.ndarray:
    """A picture in [-1, 1] in another size, (width, height)."""
    whole = Image.fromarray(images.to_uint8(picture)).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(whole, np.float32) / 127.5 - 1

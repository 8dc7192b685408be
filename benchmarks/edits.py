"""Whether runs edit: what they draw from held-out edits, beside all that they might have drawn.

    python benchmarks/edits.py runs/emoji_edit:1,4 runs/emoji_edit_flow:32 --guidance 2 \\
        --records data/emoji32/edits_held_out --sheet edits.png --figure docs/images/edits.png

Without --records the edits are of pictures that the run's data set keeps for tests. Each is drawn
from its source and instruction. It is right where the nearest of --among edits' results, its own
one of them, and of its own source, is its result; its error is the mean square to its result.
Beside that: with another edit's source, and with instructions that were shuffled; a run that reads
both is wrong there. Then the share of each kind and instruction. The sheet shows edits of each, as
each run draws them in each number of evaluations; the figure one edit of some, the median in how
much it changes, by the first run in its first number.
"""

import argparse
import dataclasses
import functools
import json
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool
from matplotlib.figure import Figure

from twinflow_jax import checkpoints, data, images, models
from twinflow_jax.arrays import HostImages
from twinflow_jax.config.run import Run
from twinflow_jax.data import edits
from twinflow_jax.errors import UserError, run_verb
from twinflow_jax.sampling import few_step, sample, solve
from twinflow_jax.training import inputs, records

ROWS = 32  # drawn at once
SHOWN = 12  # rows of the sheet
OWN = "right"  # what is drawn from an edit's own source and instruction
KINDS = {"style": "styles", "skin": "skin tones", "mirror": "mirrors"}  # by a word; else colours
FIGURE = (  # its columns
    "draw it in black and white", "exchange red and blue", "invert its colours", "mirror it",
    "give it medium skin", "give it dark skin", "draw it in Google's style",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN:EVALUATIONS",
                        help="a run's --workdir, and one number or several with commas between")
    parser.add_argument("--records", help="what twinflow encode made of held-out edits")
    parser.add_argument("--guidance", type=float, default=1.0,
                        help="classifier-free, of runs that learned none: Euler steps of two "
                        "evaluations each")
    parser.add_argument("--count", type=int, default=512, help="edits, spread over the records")
    parser.add_argument("--among", type=int, default=512,
                        help="results that the nearest is looked for among, at random")
    parser.add_argument("--sheet", help="a PNG of some of them")
    parser.add_argument("--figure", help="a PNG of one edit of each of seven instructions")
    parser.add_argument("--json", help="a file of the scores")
    args = parser.parse_args()
    columns, scores = {}, []
    for text in args.runs:
        folder, evaluations = named(text)
        run, model, params, step = checkpoints.load_weights(folder)
        said, rows = held_out(args.records, run, folder, args.count)
        targets, sources = rows["x"], rows["cond"]["references"][0]
        count = len(targets)
        noise = np.random.default_rng(0).standard_normal(targets.shape).astype(np.float32)
        print(f"{folder} at step {step}: {count} edits of "
              f"{args.records or run.data.name}, share that is right")
        of_null = rows["null"] if args.guidance != 1 and not run.objective.guidance else None
        for nfe in evaluations:
            draw, hits = sampler(model, params, nfe, args.guidance), {}
            for way, cond in ways(rows["cond"]).items():
                null = of_null and of_null | {"references": cond["references"]}
                drawn = np.concatenate([
                    draw(*jax.tree.map(lambda a: a[start : start + ROWS], (noise, cond, null)))  # noqa: B023
                    for start in range(0, count, ROWS)
                ])
                hits[way] = right(drawn, targets, sources, args.among)
                if way == OWN:
                    columns[f"{folder}, {nfe}"] = drawn
                    error = float(np.square(drawn - targets).mean())
            found = [{name: float(each.mean()) for name, each in hits.items()}]
            for names in ([kind(one) for one in said], said):
                found.append({
                    name: float(hits[OWN][np.array(names) == name].mean())
                    for name in sorted(set(names))
                })
            for part in found:
                told = "   ".join(f"{name} {value:.3f}" for name, value in part.items())
                print(f"{nfe:>3} NFE  {told}", flush=True)
            shares = {name: share for part in found for name, share in part.items()}
            scores.append({"checkpoint": folder, "nfe": nfe, "error": error} | shares)
    print(f"  copies  {right(sources, targets, None, args.among).mean():.3f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"scores": scores}, file, indent=1)
    blocks = {"source": sources, **columns, "result": targets}
    if args.figure:
        shown = typical(said, sources, targets)
        names = "source", next(iter(columns)), "result"
        parts = {name: blocks[name][shown] for name in names}
        images.save(args.figure, figure(parts, [said[place] for place in shown]))
    if args.sheet:
        chosen = spread(said)
        blocks = {name: pictures[chosen] for name, pictures in blocks.items()}
        rows = tuple(said[place] for place in chosen)
        images.save(args.sheet, images.sheet(blocks, 1, "", rows), {"rows": "\n".join(rows)})


def sampler(model: models.Model, params, nfe: int, guidance: float) -> Callable:
    """`(noise, cond, null) -> pictures` in so many evaluations, guided where null is not None.

    Raises:
      UserError: an odd number of them, guided.
    """
    def draw(noise, cond, null):
        if null is None:
            return sample(model.apply, params, noise, cond, few_step(nfe), jax.random.key(0))
        if nfe % 2:
            raise UserError(f"--guidance takes two evaluations a step: give even ones, not {nfe}")
        times = tuple(np.linspace(1, 0, nfe // 2 + 1).tolist())
        return solve(model.apply, params, noise, cond, null, times, guidance)

    return draw


def named(text: str) -> tuple[str, list[int]]:
    """The folder and the numbers of evaluations of RUN:1,4.

    Raises:
      UserError: it is not of that form.
    """
    folder, _, numbers = text.rpartition(":")
    parts = numbers.split(",")
    if not folder or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"{text} is not of the form RUN:1,4: say how many evaluations after a ':'")
    return folder, [int(part) for part in parts]


def held_out(
    folder: str | None, run: Run, workdir: str, most: int
) -> tuple[list[str], dict[str, Any]]:
    """Instructions, and a batch of their edits: a multiple of ROWS, spread over the records in a
    folder, or else over what the run's data set keeps for tests.

    Raises:
      UserError: they are others than edits of one size with one source of that size, or too few.
    """
    of = functools.partial(from_records, folder) if folder else from_tests
    count, said, read = of(run, workdir)
    if not (kept := min(most, count) // ROWS * ROWS):
        raise UserError(f"{folder or run.data.name} and --count have fewer than {ROWS} edits: "
                        "give more")
    which = np.linspace(0, count - 1, kept).astype(int)
    return [said(int(place)) for place in which], read(which, np.zeros((kept, 4), np.uint64))


def from_records(folder: str, run: Run, workdir: str):
    """(number of edits, instruction of one, batch of some) of what twinflow encode made."""
    [encoded] = records.open_folders([folder], run.model, image_free=False)
    shapes = records.by_shape([encoded], run.model, run.data.text_lengths[-1:])
    if any(shape.references != (shape.sample,) for shape in shapes) or len(shapes) > 1:
        raise UserError(f"{folder} holds other records than edits of one source, all of one "
                        "size: encode such ones")
    [(shape, [(_, split, _)])] = shapes.items()
    return (
        encoded.splits[split], lambda place: encoded.read(split, place).captions[0],
        lambda which, seeds: records.batch(encoded, split, which, seeds, shape, run.model),
    )


def from_tests(run: Run, workdir: str):
    """The same of what a run's data set keeps for tests."""
    if run.data.records:
        raise UserError(f"{workdir} was trained on records: give --records of held-out edits")
    if not run.pipeline or not (pipeline := inputs.open_pipeline(run, workdir)).family.editing:
        raise UserError(f"{workdir} was not trained on edits: give a run that was")
    pictures = data.load(run.data.name)
    tests = dataclasses.replace(pictures, train=pictures.test)
    [[stream]] = inputs.of_edits(pipeline, tests, run.data.text_tokens).streams
    changes = list(edits.CHANGES)
    return stream.count, lambda place: changes[place % len(changes)], stream.read


def ways(given: dict) -> dict[str, dict]:
    """What the network is told: all of an edit's own, and one part of another's."""
    mixed = np.random.default_rng(1).permutation(len(given["mask"]))
    said = {name: given[name] for name in ("tokens", "mask")}
    shown = {"references": given["references"]}
    shuffled = lambda part: jax.tree.map(lambda a: a[mixed], part)
    return {
        OWN: given,
        "another source": said | shuffled(shown),
        "another instruction": shuffled(said) | shown,
    }


def spread(said: list[str]) -> list[int]:
    """The first places of each instruction, all instructions in turn, at most SHOWN."""
    by_text = {text: [i for i, one in enumerate(said) if one == text] for text in sorted(set(said))}
    turns = max(len(places) for places in by_text.values())
    order = [p[turn] for turn in range(turns) for p in by_text.values() if turn < len(p)]
    return sorted(order[:SHOWN], key=lambda place: said[place])


def typical(said: list[str], sources: HostImages, targets: HostImages) -> list[int]:
    """Of each of FIGURE's instructions that was said the place of the edit that changes its source
    by the median of them in mean square."""
    changes = np.square(np.asarray(targets) - np.asarray(sources)).mean(axis=(1, 2, 3))
    shown = []
    for one in FIGURE:
        if places := [place for place, text in enumerate(said) if text == one]:
            shown.append(sorted(places, key=lambda place: changes[place])[len(places) // 2])
    return shown


def kind(said: str) -> str:
    """Of an instruction."""
    return next((name for word, name in KINDS.items() if word in said), "colours")


def figure(rows: dict[str, HostImages], said: list[str]):
    """A row of pictures for each name, a column for each instruction."""
    drawn = Figure((1.3 * len(said) + 1, 1.3 * len(rows) + 0.5), layout="constrained")
    axes = drawn.subplots(len(rows), len(said), squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(images.to_uint8(picture))
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(textwrap.fill(name, 16), rotation=0, ha="right", va="center")
    for axis, one in zip(axes[0], said, strict=True):
        axis.set_title(textwrap.fill(one, 16), fontsize="medium")
    return images.of_figure(drawn)


def right(
    drawn: HostImages, targets: HostImages, sources: HostImages | None, among: int
) -> Bool[np.ndarray, "N"]:
    """Which pictures are nearest to their own result, or to one equal to it, and not to their
    source.

    among: results that each is compared with, its own one of them, the same for all of a group.
    """
    flat = lambda pictures: np.asarray(pictures).reshape(len(pictures), -1)
    square = lambda a: (a * a).sum(-1)
    drawn, targets = flat(drawn), flat(targets)
    distances = square(drawn)[:, None] - 2 * drawn @ targets.T + square(targets)
    own = np.diagonal(distances)
    group = np.random.default_rng(2).permutation(len(drawn)) // among
    beside = np.where(group[:, None] == group, distances, np.inf)
    hits = own <= beside.min(1) + 1e-3
    if sources is not None:
        hits &= own < square(drawn - flat(sources)) + 1e-3
    return hits


if __name__ == "__main__":
    run_verb(main)

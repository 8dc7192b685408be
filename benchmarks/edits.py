"""Whether a run edits: what it draws from held-out edits, beside all that it might have drawn.

    python benchmarks/edits.py runs/emoji_edit data/emoji32/edits_held_out --steps 1 4

Each edit is drawn from its source and instruction. It is right where the nearest of all the edits'
results, and of its own source, is its result. Beside that: with another edit's source, and with
instructions that were shuffled; a run that reads both is wrong there.
"""

import argparse

import jax
import numpy as np

from twinflow_jax import checkpoints
from twinflow_jax.errors import UserError, run_verb
from twinflow_jax.sampling import few_step, sample
from twinflow_jax.training import records

ROWS = 32  # drawn at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run's --workdir")
    parser.add_argument("records", help="what twinflow encode made of held-out edits")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4], help="evaluations")
    parser.add_argument("--count", type=int, default=512, help="edits, spread over the records")
    args = parser.parse_args()
    run, model, params, step = checkpoints.load_weights(args.run)
    [folder] = records.open_folders([args.records], run.model, image_free=False)
    shapes = records.by_shape([folder], run.model, run.data.text_lengths[-1:])
    if any(shape.references != (shape.sample,) for shape in shapes) or len(shapes) > 1:
        raise UserError(f"{args.records} holds other records than edits of one source, all of one "
                        "size: encode such ones")
    [(shape, [(_, split, _)])] = shapes.items()
    count = min(args.count, folder.splits[split]) // ROWS * ROWS
    if not count:
        raise UserError(f"{args.records} and --count have fewer than {ROWS} edits: give more")
    which = np.linspace(0, folder.splits[split] - 1, count).astype(int)
    seeds = np.zeros((count, 4), np.uint64)
    rows = records.batch(folder, split, which, seeds, shape, run.model)
    given, targets = rows["cond"], rows["x"].reshape(count, -1)
    sources = given["references"][0]
    noise = np.random.default_rng(0).standard_normal(rows["x"].shape).astype(np.float32)
    mixed = np.random.default_rng(1).permutation(count)
    said = {name: given[name] for name in ("tokens", "mask")}
    ways = {
        "its own": given,
        "another source": said | {"references": tuple(a[mixed] for a in given["references"])},
        "another instruction": {k: a[mixed] for k, a in said.items()}
        | {"references": given["references"]},
    }
    print(f"{args.run} at step {step}: {count} edits of {args.records}, share that is right")
    for nfe in args.steps:
        found = {}
        for name, cond in ways.items():
            drawn = [
                sample(model.apply, params, noise[part], jax.tree.map(lambda a: a[part], cond),  # noqa: B023
                       few_step(nfe), jax.random.key(0))
                for part in (slice(start, start + ROWS) for start in range(0, count, ROWS))
            ]
            found[name] = right(np.concatenate(drawn).reshape(count, -1), targets, sources)
        print(f"{nfe:>3} NFE  " + "   ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)
    print(f"  copies  {right(sources.reshape(count, -1), targets, None):.3f}")


def right(drawn: np.ndarray, targets: np.ndarray, sources: np.ndarray | None) -> float:
    """The share whose nearest picture is its result, or equal to that."""
    square = lambda a: (a * a).sum(-1)
    distances = square(drawn)[:, None] - 2 * drawn @ targets.T + square(targets)
    own = np.diagonal(distances)
    hit = own <= distances.min(1) + 1e-3
    if sources is not None:
        copied = square(drawn - sources.reshape(len(drawn), -1))
        hit &= own < copied + 1e-3
    return float(hit.mean())


if __name__ == "__main__":
    run_verb(main)

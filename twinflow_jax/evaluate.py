"""Score runs: `python -m twinflow_jax.evaluate --checkpoint runs/mnist --json scores.json`.

An independent classifier, trained on the real training split, judges class-conditional samples
at each number of evaluations. Several --checkpoint stand in one table. Samples are clamped to
[-1, 1], as they are written.
"""

import argparse
import json

import numpy as np

from twinflow_jax import checkpoints, data, evaluation, files, images
from twinflow_jax.errors import UserError, run_verb
from twinflow_jax.evaluation import report, sample_labels
from twinflow_jax.sampling import arguments, generate

COLUMNS = 8  # of the sheet


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m twinflow_jax.evaluate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, action="append", metavar="RUN",
                        help="the --workdir of a training run; may be given several times")
    parser.add_argument("--json", metavar="FILE", help="write the scores there")
    parser.add_argument("--plot", metavar="FILE", help="draw scores over evaluations (PNG)")
    parser.add_argument("--sheet", metavar="FILE", help="draw samples of every run (PNG)")
    parser.add_argument("--steps", default="1,2,4", help="evaluations (default 1,2,4)")
    parser.add_argument("--count", type=int, default=1000, help="samples per score (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", action="store_true", help="raw weights instead of the average")
    arguments.add(parser)
    args = parser.parse_args()

    try:
        steps = [int(part) for part in args.steps.split(",")]
    except ValueError as error:
        raise UserError(f"--steps is {args.steps!r}; give numbers like 1,2,4") from error
    grids = [arguments.grid(args, n) for n in steps]
    if args.count < 200:
        raise UserError(f"--count is {args.count}; scores need at least 200 samples")
    loaded = {run: checkpoints.load_weights(run, args.raw) for run in args.checkpoint}
    names = {config.data.name for config, *_ in loaded.values()}
    if len(names) > 1:
        raise UserError(f"the runs were trained on different data ({', '.join(sorted(names))})")
    dataset = data.load(names.pop())
    if any(model.config.num_classes == 0 for _, model, *_ in loaded.values()):
        raise UserError("scores are of class-conditional samples, and a run has no classes")
    judge = evaluation.Judge.create(dataset)
    labels = sample_labels(args.count, dataset.num_classes)

    shown = np.concatenate(  # rows are classes
        [np.flatnonzero(labels == c)[:COLUMNS] for c in range(dataset.num_classes)]
    )
    rows, blocks = [], {}
    for run, (_, model, params, step) in loaded.items():
        for grid in grids:
            x = generate(model, params, labels, grid, args.seed, progress=False)
            scores = judge.score(x, labels)
            rows.append({"run": run, "step": step, "nfe": grid.nfe} | scores)
            blocks[f"{run}, {grid.nfe} NFE"] = (x[shown], scores)
    print(report.table(rows, judge.real))
    try:
        if args.json:
            record = {"real": judge.real, "count": args.count, "seed": args.seed, "scores": rows}
            files.write(args.json, json.dumps(record, indent=2).encode())
        if args.plot:
            images.save(args.plot, report.plot(rows, judge.real))
        if args.sheet:
            captions = {
                f"{name}: {s['accuracy']:.3f} / {s['frechet']:.1f}": x
                for name, (x, s) in blocks.items()
            }
            images.save(args.sheet, images.sheet(captions, COLUMNS, "accuracy / Frechet distance"))
    except OSError as error:
        raise UserError(f"cannot write the results: {error}") from error
    return 0


if __name__ == "__main__":
    run_verb(main)

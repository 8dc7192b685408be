"""Score runs: `python -m twinflow_jax.evaluate --checkpoint runs/mnist --json scores.json`.

Class-conditional samples are judged by an independent classifier, trained on the real training
split. Samples of text-to-image runs are drawn from the captions of held-out records and judged
through the features of an independent network, by a map to captions fitted to training records:

    python -m twinflow_jax.evaluate --checkpoint runs/emoji --records records/held_out \\
        --train-records records/train --features features.safetensors

(tools/encode.py writes records, tools/features.py the features' weights.) Several --checkpoint
stand in one table. Samples are clamped to [-1, 1], as they are written.
"""

import argparse
import dataclasses
import json

import numpy as np
from jaxtyping import Float

from twinflow_jax import checkpoints, data, evaluation, files, images
from twinflow_jax.errors import UserError, run_verb
from twinflow_jax.evaluation import captioned, drawing, features, report, sample_labels
from twinflow_jax.sampling import arguments, generate

COLUMNS, ROWS = 8, 8  # of the sheet: samples of a class, and captions
CAPTIONS_ONLY = ("train_records", "features", "seeds", "guidance", "pipeline")


@dataclasses.dataclass
class Scores:
    """rows: of the table. real: references. blocks: of the sheet by name, all with `captions`
    for their rows, where they have any. settings: what else the JSON says."""

    rows: list[report.Row]
    real: dict[str, float]
    blocks: dict[str, Float[np.ndarray, "_ H W C"]]
    title: str
    settings: dict
    columns: int = COLUMNS
    captions: tuple[str, ...] = ()


def main() -> int:
    args = parse()
    try:
        steps = [int(part) for part in args.steps.split(",")]
    except ValueError as error:
        raise UserError(f"--steps is {args.steps!r}; give numbers like 1,2,4") from error
    if min(steps) < 1:
        raise UserError(f"--steps is {args.steps!r}; sampling takes at least 1")
    scores = by_caption(args, steps) if args.records else by_class(args, steps)
    print(report.table(scores.rows, scores.real))
    try:
        if args.json:
            record = {"real": scores.real, **scores.settings, "scores": scores.rows}
            files.write(args.json, json.dumps(record, indent=2).encode())
        if args.plot:
            images.save(args.plot, report.plot(scores.rows, scores.real))
        if args.sheet:
            sheet = images.sheet(scores.blocks, scores.columns, scores.title, scores.captions)
            images.save(args.sheet, sheet, {"rows": "\n".join(scores.captions)})
    except OSError as error:
        raise UserError(f"cannot write the results: {error}") from error
    return 0


def parse() -> argparse.Namespace:
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
    parser.add_argument("--count", type=int,
                        help="samples per score (default 1000), or held-out captions (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", action="store_true", help="raw weights instead of the average")
    group = parser.add_argument_group("from captions")
    group.add_argument("--records", metavar="FOLDER", help="held-out records to draw and compare")
    group.add_argument("--train-records", metavar="FOLDER", help="that the runs were trained on")
    group.add_argument("--features", metavar="FILE", help="what tools/features.py wrote")
    group.add_argument("--seeds", type=int, help="samples of each caption (default 4)")
    group.add_argument(
        "--guidance", type=float,
        help="of runs trained by flow matching: plain Euler steps of two evaluations; 1 is none",
    )
    group.add_argument("--pipeline", help="the imported checkpoint of the runs (default: as each "
                       "says)")
    arguments.add(parser)
    args = parser.parse_args()
    if args.records and not (args.train_records and args.features):
        raise UserError("--records needs --train-records and --features beside it")
    if not args.records:
        arguments.refuse(args, CAPTIONS_ONLY, "without --records, samples are by class")
    if args.guidance is not None:
        arguments.refuse(args, arguments.NAMES, "--guidance samples by plain Euler steps")
    return args


def by_class(args, steps: list[int]) -> Scores:
    """Of class-conditional runs."""
    grids = [arguments.grid(args, n) for n in steps]
    count = 1000 if args.count is None else args.count
    if count < 200:
        raise UserError(f"--count is {count}; scores need at least 200 samples")
    configs = {run: checkpoints.read_config(run) for run in args.checkpoint}
    if any(config.get("pipeline") for config in configs.values()):
        raise UserError("a run draws from text: give --records, --train-records and --features")
    loaded = {run: checkpoints.load_weights(run, args.raw) for run in args.checkpoint}
    names = {config.data.name for config in configs.values()}
    if len(names) > 1:
        raise UserError(f"the runs were trained on different data ({', '.join(sorted(names))})")
    dataset = data.load(names.pop())
    if any(model.config.num_classes == 0 for _, model, *_ in loaded.values()):
        raise UserError("scores are of class-conditional samples, and a run has no classes")
    judge = evaluation.Judge.create(dataset)
    labels = sample_labels(count, dataset.num_classes)
    shown = np.concatenate(  # rows are classes
        [np.flatnonzero(labels == c)[:COLUMNS] for c in range(dataset.num_classes)]
    )
    rows, blocks = [], {}
    for run, (_, model, params, step) in loaded.items():
        for grid in grids:
            x = generate(model, params, labels, grid, args.seed, progress=False)
            scores = judge.score(x, labels)
            rows.append({"run": run, "step": step, "nfe": grid.nfe} | scores)
            name = f"{run}, {grid.nfe} NFE: {scores['accuracy']:.3f} / {scores['frechet']:.1f}"
            blocks[name] = x[shown]
    settings = {"count": count, "seed": args.seed}
    return Scores(rows, judge.real, blocks, "accuracy / Frechet distance", settings)


def by_caption(args, steps: list[int]) -> Scores:
    """Of text-to-image runs, on the captions of held-out records."""
    seeds = 4 if args.seeds is None else args.seeds
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}; draw at least one sample of each caption")
    if args.count is not None and args.count < 2:
        raise UserError(f"--count is {args.count}; scores need at least 2 captions")
    grids = {n: arguments.grid(args, n) for n in steps} if args.guidance is None else {}
    held_out, train = drawing.open_pair(args.records, args.train_records)
    runs = {
        run: drawing.open_run(run, args.raw, args.pipeline, held_out) for run in args.checkpoint
    }
    samplers = {
        (name, grids[n].nfe if grids else n): run.pipeline.few_step(grids[n])
        if grids else drawing.plain(run, n, args.guidance)
        for name, run in runs.items() for n in steps
    }
    network = features.load(args.features)
    decode = drawing.decoder(held_out, next(iter(runs.values())).pipeline)
    captions = drawing.hold_out(held_out, args.count, decode)
    judge = drawing.create_judge(network.remembered, train, captions, decode)
    owners = drawing.owners_of(captions, seeds)
    some, pictures = drawing.shown(captions, seeds, ROWS)
    rows, blocks = [], {"real": captions.real[some]}
    for (name, nfe), sampler in samplers.items():
        run = runs[name]
        x = drawing.draw(run, captions, seeds, args.seed, sampler, decode)
        scores = judge.score(captioned.Pictures.see(network, [x]), owners)
        rows.append({"run": name, "step": run.step, "nfe": nfe} | scores)
        print(f"{name}, {nfe} NFE: R@1 {scores['retrieval']:.3f}", flush=True)
        label = f"{name}, {nfe} NFE: {scores['retrieval']:.3f} / {scores['frechet']:.1f}"
        blocks[label] = x[pictures]
    settings = {
        "captions": len(captions.texts), "seeds": seeds, "seed": args.seed,
        "guidance": args.guidance,
    }
    return Scores(
        rows, judge.real(len(owners)), blocks, "R@1 / Frechet distance", settings, seeds,
        tuple(captions.texts[i] for i in some),
    )


if __name__ == "__main__":
    run_verb(main)

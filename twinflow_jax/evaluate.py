"""Score runs: by class, or on captions that they never saw.

    python -m twinflow_jax.evaluate classes --checkpoint runs/mnist --json scores.json
    python -m twinflow_jax.evaluate captions --checkpoint runs/emoji --records records/held_out \\
        --train-records records/train --features features.safetensors

Several --checkpoint stand in one table. Samples are clamped to [-1, 1], as they are written.
"""

import argparse
import sys

from twinflow_jax import arguments, files, seeds
from twinflow_jax.errors import UserError, run_verb

CLASSES = """Samples of class-conditional runs, judged by an independent classifier that is trained
on the real training split: accuracy, Frechet distance of its features to held-out images,
diversity within a class, distance to the nearest training image."""

CAPTIONS = """Samples of text-to-image runs, drawn from the captions of held-out records and judged
through the features of an independent network, by a map to captions that is fitted to training
records (twinflow encode writes records, twinflow features the features' weights)."""


def main() -> int:
    if not {"classes", "captions", "-h", "--help"} & set(sys.argv[1:2]):
        raise UserError("say what scores: `evaluate classes` for class-conditional runs, `evaluate "
                        "captions` for text-to-image runs, and then the rest")
    args = parse()
    for flag in ("--json", "--plot", "--sheet"):
        arguments.writable(flag, getattr(args, flag[2:]))
    from twinflow_jax.evaluation import by_caption, by_class, report

    steps = arguments.evaluations(args.steps)
    if args.judge == "classes":
        found = by_class.score(
            args.checkpoint, steps, arguments.sampler(args), args.count, args.seed, args.raw
        )
    else:
        found = by_caption.score(
            args.checkpoint, steps, arguments.sampler(args), args.count, args.seed, args.raw,
            by_caption.Source(
                args.records, args.train_records, args.features, args.seeds, args.guidance,
                args.pipeline,
            ),
        )
    for scores in found:  # each is of everything so far: what is known is kept
        report.write(scores, json_file=args.json)
    print(report.table(scores.rows, scores.real))
    report.write(scores, plot_file=args.plot, sheet=args.sheet)
    return 0


def parse() -> argparse.Namespace:
    parser = arguments.parser("evaluate", __doc__)
    judges = parser.add_subparsers(dest="judge", required=True, metavar="JUDGE")
    classes = judges.add_parser("classes", help="of class-conditional runs", description=CLASSES)
    captions = judges.add_parser("captions", help="of text-to-image runs", description=CAPTIONS)
    for judge in (classes, captions):
        judge.add_argument("--checkpoint", type=files.path, required=True, action="append",
                           metavar="RUN",
                           help="the --workdir of a training run; may be given several times")
        judge.add_argument("--json", type=files.path, metavar="FILE", help="write the scores there")
        judge.add_argument("--plot", type=files.path, metavar="FILE",
                           help="draw scores over evaluations (PNG)")
        judge.add_argument("--sheet", type=files.path, metavar="FILE",
                           help="draw samples of every run (PNG)")
        judge.add_argument("--steps", default="1,2,4", help="evaluations (default 1,2,4)")
        judge.add_argument("--seed", type=seeds.parse, default=0)
        judge.add_argument("--raw", action="store_true", help="raw weights, not the average")
    classes.add_argument("--count", type=int, default=1000, help="samples per score")
    captions.add_argument("--count", type=int, help="held-out captions to draw (default: all)")
    captions.add_argument("--records", type=files.path, metavar="FOLDER", required=True,
                          help="held-out records to draw and compare")
    captions.add_argument("--train-records", type=files.path, metavar="FOLDER", required=True,
                          help="that the runs were trained on")
    captions.add_argument("--features", type=files.path, metavar="FILE", required=True,
                          help="what twinflow features wrote")
    captions.add_argument("--seeds", type=int, default=4, help="samples of each caption")
    captions.add_argument(
        "--guidance", type=arguments.finite,
        help="of runs trained by flow matching: plain Euler steps of two evaluations; 1 is none",
    )
    captions.add_argument("--pipeline", type=files.path,
                          help="the imported checkpoint of the runs (default: as each says)")
    for judge in (classes, captions):
        arguments.add_sampler(judge)
    args = parser.parse_args()
    if args.judge == "captions" and args.guidance is not None:
        arguments.refuse(args, arguments.SAMPLER, "--guidance samples by plain Euler steps")
    return args


if __name__ == "__main__":
    run_verb(main)

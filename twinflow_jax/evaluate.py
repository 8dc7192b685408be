"""Score runs and published models.

    python -m twinflow_jax.evaluate classes --checkpoint runs/mnist --json scores.json
    python -m twinflow_jax.evaluate captions --checkpoint runs/emoji --records records/held_out \\
        --train-records records/train --features features.safetensors
    python -m twinflow_jax.evaluate suite draw geneval --prompts clones/geneval \\
        --checkpoint runs/sana --out pictures/geneval
    python -m twinflow_jax.evaluate diversity pictures/geneval --weights lpips.safetensors
    python -m twinflow_jax.evaluate speed --checkpoint runs/sana

Several --checkpoint of classes or captions stand in one table. Samples are clamped to [-1, 1], as
they are written. docs/evaluation.md leads through the suites.
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

SUITE = """A published suite of prompts with an official scorer, which runs elsewhere: draw its
pictures as the scorer wants them, check them, read what the scorer wrote, and put several suites in
one table beside the paper's."""

DRAW = """Draws a suite's pictures into a folder that holds nothing else; beside it lies its
manifest. Stopped at any point, the same command goes on; with --process K --processes N, or with
--coordinator on the hosts of a pod, several share the work."""

CHECK = """Looks for missing, foreign, torn and wrong-sized files, and prints the scorer's
command."""

READ = """Reads the files that the scorer wrote, computes its score again with an interval, and
keeps it beside the folder for the table."""

TABLE = """What was read of one run's folders, beside the paper's scores and the teacher's."""

DIVERSITY = """How different the pictures of one prompt are, by LPIPS (twinflow features writes its
weights); kept beside the folder for the table."""

SPEED = """Pictures a second at batch 10 and seconds of one alone, from prompt to pixels and of each
stage, on this device."""

JUDGES = ("classes", "captions", "suite", "diversity", "speed")


def main() -> int:
    if not {*JUDGES, "-h", "--help"} & set(sys.argv[1:2]):
        raise UserError("say what scores: `evaluate classes` for class-conditional runs, `evaluate "
                        "captions` for text-to-image runs, `evaluate suite` for published suites "
                        "(or `diversity`, `speed`), and then the rest")
    args = parse()
    for flag in ("json", "plot", "sheet", "markdown"):
        arguments.writable(f"--{flag}", getattr(args, flag, None))
    if args.judge in ("classes", "captions"):
        return score_runs(args)
    if args.judge == "speed":
        from twinflow_jax.evaluation import speed

        return speed.speed(args)
    from twinflow_jax.evaluation.suites import commands

    return getattr(commands, args.verb if args.judge == "suite" else args.judge)(args)


def parse() -> argparse.Namespace:
    parser = arguments.parser("evaluate", __doc__)
    judges = parser.add_subparsers(dest="judge", required=True, metavar="JUDGE")
    add_runs(judges)
    suite = judges.add_parser("suite", help="published suites: draw, check, read, table",
                              description=SUITE)
    add_suites(suite.add_subparsers(dest="verb", required=True, metavar="VERB"))
    one = judges.add_parser("diversity", help="of the pictures of one prompt, by LPIPS",
                            description=DIVERSITY)
    one.add_argument("folder", type=files.path, metavar="DIR", help="that `suite draw` filled")
    one.add_argument("--weights", type=files.path, metavar="FILE", required=True,
                     help="what twinflow features wrote")
    one.add_argument("--network", choices=("alex", "vgg"), default="alex",
                     help="default: alex, as the paper")
    add_prompts(one, False)
    one = judges.add_parser("speed", help="pictures a second, and seconds of one",
                            description=SPEED)
    add_drawing(one, batch=False)
    one.add_argument("--json", type=files.path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    if args.judge == "captions" and args.guidance is not None:
        arguments.refuse(args, arguments.SAMPLER, "--guidance samples by plain Euler steps")
    return args


def add_runs(judges) -> None:
    """The judges of runs: `classes` and `captions`."""
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


def add_suites(verbs) -> None:
    """The verbs of `suite`."""
    one = verbs.add_parser("draw", help="the pictures", description=DRAW)
    one.add_argument("suite", metavar="SUITE", help="geneval, dpg, wise-legacy, wise-verified, "
                     "longtext-en, longtext-zh or geneval2; of a network that edits pictures "
                     "gedit, gedit-cn or imgedit")
    one.add_argument("--out", type=files.path, required=True, metavar="DIR",
                     help="folder for the pictures and nothing else")
    add_prompts(one, True)
    add_images(one)
    one.add_argument("--unpublished", action="store_true",
                     help="take prompts that are not the suite's published ones, of any number")
    one.add_argument("--rewritten", type=files.path, metavar="FILE",
                     help="texts to draw in the prompts' place, JSON lines of prompt and text, or "
                     "WISE's folder of them; tables mark their scores")
    one.add_argument("--seed", type=seeds.parse, default=0)
    add_drawing(one)
    one.add_argument("--process", type=int, default=0, help="which one this is, from 0")
    one.add_argument("--processes", type=arguments.whole, default=1, help="that share the work")
    one.add_argument("--coordinator", metavar="HOST:PORT",
                     help="of process 0, on several hosts that JAX has to join; auto on a TPU pod")

    one = verbs.add_parser("check", help="what was drawn; prints the scorer's command",
                           description=CHECK)
    one.add_argument("folder", type=files.path, metavar="DIR")
    add_prompts(one, False)
    add_images(one)

    one = verbs.add_parser("read", help="the scorer's results", description=READ)
    one.add_argument("folder", type=files.path, metavar="DIR")
    one.add_argument("--results", type=files.path, metavar="FILE", nargs="+", required=True,
                     help="what the scorer wrote, and what its summary printed")
    one.add_argument("--judge", metavar="NAME", dest="judged_by",
                     help="who judged, where it was not the suite's own judge")
    one.add_argument("--partial", action="store_true",
                     help="take results of which some are missing")
    add_prompts(one, False)

    one = verbs.add_parser("table", help="one run's suites, the paper's and the teacher's",
                           description=TABLE)
    one.add_argument("folders", type=files.path, metavar="DIR", nargs="+")
    one.add_argument("--teacher", type=files.path, metavar="DIR", nargs="+", default=[],
                     help="folders of the same suites that the base model drew")
    one.add_argument("--json", type=files.path, metavar="FILE", help="write the table there")
    one.add_argument("--markdown", type=files.path, metavar="FILE", help="write the table there")


def add_prompts(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--prompts", type=files.path, metavar="PATH", required=required,
        help="a clone of the suite's repository, or the prompts in it"
        + ("" if required else " (default: where they were)"),
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=files.path, metavar="DIR",
        help="of imgedit: the pictures that its prompts are about, Benchmark.tar unpacked",
    )


def add_drawing(parser: argparse.ArgumentParser, batch: bool = True) -> None:
    """What draws, as in `sample`. batch: whether its size may be chosen."""
    parser.add_argument("--checkpoint", type=files.path, required=True,
                        help="a run's --workdir, or imported")
    parser.add_argument("--steps", type=int, help="of the sampler (default 1, --base: as usual)")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of the average")
    parser.add_argument("--at-step", type=int, help="checkpoint to read (default: the newest)")
    arguments.add_pipeline(parser, batch)
    arguments.add_sampler(parser)


def score_runs(args: argparse.Namespace) -> int:
    """`classes` and `captions`."""
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


if __name__ == "__main__":
    run_verb(main)

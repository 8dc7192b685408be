"""What training would take on TPUs that are not here: memory, communication and about how long.

    python -m twinflow_jax.plan --config configs/qwen20b_tpu.py --topology v5p:4x4x4
    python -m twinflow_jax.plan --config configs/qwen20b_tpu.py --topology v5p-128 --search
    python -m twinflow_jax.plan --config configs/sana16b_tpu.py --topology v5p:4x4x4 \\
        --objective released rcgm meanflow_difference dmd2

The TPU compiler itself says what fits and what moves (`pip install -e ".[pod]"`, no TPU and no
weights needed); seconds are a model. A plan takes minutes; what the compiler said is kept in
~/.cache/twinflow_jax. Several topologies, strategies and so on make one plan each, and several
--config.data.text_tokens too, with the mean step where data.records are here; --search tries the
usual ones of those that are not given.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator

from twinflow_jax import arguments, files
from twinflow_jax.errors import UserError, run_verb

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs, and a GPU would only be in the way

SEARCHED = {
    "objective": (None,), "strategy": ("gather_layers", "gather_once"),
    "remat": ("full", "dots"), "scale": (1, 2),
}


def main() -> int:
    args, overrides = parse()
    for flag in ("--json", "--plot", "--hlo"):
        arguments.writable(flag, getattr(args, flag[2:]))
    from etils import epath
    from tqdm import tqdm

    from twinflow_jax import config as configs
    from twinflow_jax.planning import plan, report, topology
    from twinflow_jax.training import inputs, setup

    topologies = [topology.resolve(name) for name in args.topology]
    if args.parameters:
        for where in topologies:
            prepared = setup.prepare(configs.parse(args.config, overrides), topology.devices(where))
            print(report.parameters(where.name, prepared.model, prepared.strategy.mesh))
        return 0
    chosen = [choices(args, name) for name in SEARCHED]
    first = varied(args.config, overrides, *(values[0] for values in chosen))
    texts = first.data.text_lengths if args.mode == "train" else (first.shape.text,)
    variants = list(itertools.product(topologies, *chosen, texts))
    longest = slice(len(texts) - 1, None, len(texts))
    if args.hlo and len(variants) > 1:
        raise UserError(f"--hlo writes one program, but {len(variants)} plans are asked for")
    hlo_file = epath.Path(args.hlo) if args.hlo else None
    # All of them first: the plan of one takes minutes.
    runs = [varied(args.config, overrides, *what) for _, *what in variants]
    plans = []
    bar = tqdm(variants, unit="plan", disable=not sys.stderr.isatty())
    told = lambda known: bar.write(report.known(known), file=sys.stderr)
    bar.write(report.HEADER) if len(variants) > 1 else None
    for (where, *_), run in zip(bar, runs, strict=True):
        try:
            with ticking(bar):
                if args.mode == "sample":
                    plans.append(plan.sample(run, where, args.steps, hlo_file, told))
                else:
                    plans.append(plan.train(run, where, hlo_file, told))
        except UserError as error:
            if len(variants) == 1:
                raise
            plans.append(plan.impossible(run, where, str(error)))
        bar.write(report.line(plans[-1])) if len(variants) > 1 else None
        if args.json:  # what is done so far, since each takes minutes
            record = json.dumps([one.to_json() for one in plans], indent=2)
            files.write(epath.Path(args.json), record.encode())
    if shares := inputs.by_text(plan.shares(first)) if len(texts) > 1 else {}:
        for start in range(0, len(plans), len(texts)):
            print(report.mean(plans[start : start + len(texts)], shares))
    plans = plans[longest]
    if len(plans) == 1:
        print(report.details(plans[0]))
    elif any(not p.refused for p in plans):
        best = min((p for p in plans if not p.refused), key=lambda p: p.overlapped / p.rows)
        print(f"\nfastest per image:\n{report.details(best)}")
    if args.objective and len(plans) > 1:
        names = [each for _, each, *_ in variants[longest]]
        print(f"\n{report.by_objective(names, plans)}")
    if args.plot:
        report.plot(plans, args.plot)
    return 0 if any(not p.refused for p in plans) else 1


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = arguments.parser("plan", __doc__)
    parser.add_argument("--config", type=files.path, required=True, metavar="FILE[:VARIANT]",
                        help="a config file")
    parser.add_argument(
        "--topology", required=True, nargs="+", metavar="NAME",
        help="v5p:4x4x4, 2*v5p:4x4x4 for two slices, or a cloud name like v5p-128, v6e-256",
    )
    parser.add_argument("--mode", choices=("train", "sample"), default="train")
    parser.add_argument("--steps", type=arguments.whole, default=1,
                        help="evaluations, with --mode sample")
    parser.add_argument("--objective", nargs="+", metavar="PRESET",
                        help="presets of objectives, instead of the config's objective")
    parser.add_argument("--strategy", nargs="+", help="instead of mesh.strategy")
    parser.add_argument("--remat", nargs="+", help="instead of model.remat")
    parser.add_argument("--scale", nargs="+", type=arguments.whole,
                        help="multiples of data.batch_size")
    parser.add_argument("--search", action="store_true", help="try the usual of the three above")
    parser.add_argument("--json", type=files.path, metavar="FILE", help="write the plans")
    parser.add_argument("--plot", type=files.path, metavar="FILE.png", help="draw memory and time")
    parser.add_argument(
        "--parameters", action="store_true", help="only where each weight lies; compiles nothing"
    )
    parser.add_argument("--hlo", type=files.path, metavar="FILE", help="write the compiled program")
    args, rest = parser.parse_known_args()
    return args, arguments.overrides(rest)


@contextlib.contextmanager
def ticking(bar) -> Iterator[None]:
    """Keeps the clock of a bar going: the compiler says nothing for minutes."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def choices(args, name: str) -> tuple:
    """The values that a plan is made for; None leaves the config's own."""
    given = getattr(args, name)
    return tuple(given) if given else SEARCHED[name] if args.search else (None,)


def varied(file: str, overrides: list[str], objective, strategy, remat, scale, text=None):
    """The run with another objective, strategy, rematerialisation, multiple of its batch, and
    tokens of text."""
    from twinflow_jax import config as configs

    more = [f"objective={objective}"] if objective else []
    more += [f"mesh.strategy={strategy}"] if strategy else []
    more += [f"model.remat={remat}"] if remat else []
    run = configs.parse(file, [*overrides, *more])
    rows = run.data.batch_size * (scale or 1)
    given = {"text_tokens": text} if text else {}
    return dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=rows, **given))


if __name__ == "__main__":
    run_verb(main)

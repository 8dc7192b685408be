"""TwinFlow against RCGM with the same search for both, then on several seeds.

    python benchmarks/compare.py mnist --out runs/compare
    python benchmarks/compare.py emoji --out runs/compare_emoji   # after configs/emoji.py's :flow

Each method gets --trials random settings of its own keys (the first is the config's own), trained
with the first seed by the config's network, data, steps and start. The --finalists best of each by
Frechet distance at one evaluation are trained with the other seeds too, and stand in the table.
Scores are those of `twinflow evaluate` at 1, 2 and 4 evaluations. What is done stays in --out: the
same command goes on. On one GPU give more --jobs, XLA_PYTHON_CLIENT_PREALLOCATE=false and a
JAX_COMPILATION_CACHE_DIR.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import time

from tqdm import tqdm

from twinflow_jax import config as configs

Settings = dict[str, object]  # overrides of a config, by key
OWN = {  # multiples of the config's own value
    "objective.guidance": (0.0, 0.5, 0.75, 1.0, 1.25, 1.5),
    "optimizer.learning_rate": (0.5, 1.0, 2.0),
}
BOTH = {
    "objective.order": (1, 2),
    "objective.dt": (0.01, 0.03, 0.1),
    "objective.teacher_decay": (0.0, 0.99, 0.999),
    "objective.sample_weight": (True, False),
}
ONE_STEP, TWIN = (0.05, 0.1, 0.2, 0.3), (0.05, 0.1, 0.2, 0.3)  # shares of the batch
RECTIFY = {"objective.rectify_weight": (0.1, 0.25, 0.5, 1.0, 2.0),
           "objective.rectify_clip": (0.0, 1.0, 4.0)}
METHODS = ("TwinFlow", "RCGM")


@dataclasses.dataclass(frozen=True)
class Study:
    """A config, and how its runs are judged."""

    config: str
    judge: tuple[str, ...]

    @functools.cached_property
    def own(self) -> dict[str, float]:
        """The config's own values, by key."""
        return configs.flatten(configs.load(self.config).to_dict())


STUDIES = {
    "mnist": Study("configs/mnist.py", ("classes",)),
    "emoji": Study(
        "configs/emoji.py",
        ("captions", "--records", "data/emoji32/held_out_concepts", "--train-records",
         "data/emoji32/train", "--features", "features.safetensors"),
    ),
}


def settings(study: Study, method: str, trial: int) -> Settings:
    """Of one trial: the same for everybody, trial 0 being the config's own."""
    plain = {} if method == "TwinFlow" else {
        "objective.ratios": (1.0, 1.0, 1.0, 0.0), "objective.rectify_weight": 0.0
    }
    if trial == 0:
        return plain
    rng = random.Random(f"{method} {trial}")
    drawn = {key: study.own[key] * rng.choice(by) for key, by in OWN.items()}
    drawn |= {key: rng.choice(values) for key, values in BOTH.items()}
    one = rng.choice(ONE_STEP)
    twin = rng.choice(TWIN) if method == "TwinFlow" else 0.0
    rest = rng.choice((0.3, 0.5, 0.7))  # of what is left, to the multi_step rows
    left = 1 - one - twin
    ratios = tuple(round(share, 3) for share in (one, rest * left, (1 - rest) * left, twin))
    if method == "TwinFlow":
        drawn |= {key: rng.choice(values) for key, values in RECTIFY.items()}
    return plain | drawn | {"objective.ratios": ratios}


@dataclasses.dataclass(frozen=True)
class Run:
    method: str
    trial: int
    seed: int

    def folder(self, out: pathlib.Path) -> pathlib.Path:
        return out / self.method / f"{self.trial:02d}" / str(self.seed)

    def scores(self, out: pathlib.Path) -> dict[str, dict[str, float]] | None:
        """By evaluations; None where it did not come to its end."""
        file = self.folder(out) / "scores.json"
        return json.loads(file.read_text()) if file.exists() else None


def do(run: Run, study: Study, out: pathlib.Path, more: list[str]) -> None:
    """Trains and scores one run; the log of both is in its folder."""
    folder = run.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = settings(study, run.method, run.trial)
    overrides = [f"--config.{key}={value}" for key, value in chosen.items()]
    work, table = folder / "run", folder / "table.json"
    verb = [sys.executable, "-m"]
    with open(folder / "log", "w") as log:
        for command in (
            [*verb, "twinflow_jax.train", "--config", study.config, "--workdir", str(work),
             f"--config.train.seed={run.seed}", *overrides, *more],
            [*verb, "twinflow_jax.evaluate", *study.judge, "--checkpoint", str(work),
             "--json", str(table)],
        ):
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
                return  # the same command tries again
    scores = {str(row["nfe"]): row for row in json.loads(table.read_text())["scores"]}
    (folder / "scores.json").write_text(json.dumps(scores, indent=1))
    shutil.rmtree(work / "checkpoints", ignore_errors=True)


def ranking(out: pathlib.Path, method: str, trials: int, seed: int) -> dict[int, float]:
    """Frechet distances at one evaluation of the trials that are done, the lowest first."""
    found = {trial: Run(method, trial, seed).scores(out) for trial in range(trials)}
    distances = {trial: scores["1"]["frechet"] for trial, scores in found.items() if scores}
    return dict(sorted(distances.items(), key=lambda item: item[1]))


def table(study: Study, out: pathlib.Path, chosen: list[tuple[str, int]], seeds: list[int]) -> str:
    """Mean and range over seeds of each score, a row for each setting and evaluations."""
    lines = []
    for method, trial in chosen:
        runs = [Run(method, trial, seed).scores(out) for seed in seeds]
        runs = [scores for scores in runs if scores]
        lines.append(f"{method} {trial} ({len(runs)} seeds): {settings(study, method, trial)}")
        for nfe in ("1", "2", "4"):
            values = {
                name: [scores[nfe][name] for scores in runs]
                for name, value in runs[0][nfe].items() if isinstance(value, float)
            }
            lines.append(f"  {nfe} NFE  " + "  ".join(
                f"{name} {statistics.mean(v):.4g} [{min(v):.4g}, {max(v):.4g}]"
                for name, v in values.items()
            ))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--finalists", type=int, default=2)
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--seconds", type=float, default=float("inf"),
                        help="no trial of the search begins later")
    args, more = parser.parse_known_args()
    study, seeds, began = STUDIES[args.study], [int(s) for s in args.seeds.split(",")], time.time()

    def finish(runs: list[Run], what: str, seconds: float) -> None:
        def one(run: Run) -> None:
            if run.scores(args.out) is None and time.time() - began < seconds:
                do(run, study, args.out, more)

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            list(tqdm(pool.map(one, runs), total=len(runs), desc=what, unit="run"))

    trials = range(args.trials)
    finish([Run(m, trial, seeds[0]) for trial in trials for m in METHODS], "search", args.seconds)
    ranked = {method: ranking(args.out, method, args.trials, seeds[0]) for method in METHODS}
    if missing := [method for method in METHODS if not ranked[method]]:
        raise SystemExit(
            f"no run of {', '.join(missing)} came to its end: see {args.out}/*/*/*/log"
        )
    chosen = [
        (method, trial) for method in METHODS
        for trial in dict.fromkeys([*list(ranked[method])[: args.finalists], 0])
    ]
    finish([Run(*pair, seed) for seed in seeds[1:] for pair in chosen], "seeds", float("inf"))
    for method in METHODS:
        print(method, "trials by Frechet distance at 1 NFE:", ", ".join(
            f"{trial}: {distance:.1f}" for trial, distance in ranked[method].items()
        ))
    print(table(study, args.out, chosen, seeds))


if __name__ == "__main__":
    main()

"""Objectives against each other: the same start, network, data, budget, search and judge.

    python benchmarks/compare.py digits --out runs/compare_digits
    python benchmarks/compare.py mnist --out runs/compare --methods twinflow,rcgm --trials 16
    python benchmarks/compare.py emoji --out runs/compare_emoji   # after configs/emoji.py's :flow
    python benchmarks/compare.py digits_lora --out runs/compare_digits_lora --trials 4
        # or emoji_lora, or edits_lora

For each seed a network learns velocities first; every method goes on from there, for as many
forward-equivalents as the study's first makes in its steps (a pass with gradient is three, an exact
derivative one). With --trials N each method gets N random settings, all with the first seed: the
same multiples of the rate and the guidance, and keys of its own; trial 0 is its preset with the
study's rate and guidance. The --finalists best at one evaluation, by Frechet distance or the error
of edits, and each preset, are trained with the other seeds too and stand in OUT/table.md and
OUT/table.png; with --share .25 the search itself trains a quarter of the steps only and is judged
at one evaluation only, and finalists train all with all seeds.
--steps is another budget than the study's, for a machine that is slow: one --out for each. Scores
are those of `twinflow evaluate` and, of edits, of benchmarks/edits.py; the start's own stand
beside. `--methods rcgm:64` trains that one trial in place of a search. What is done stays in
--out: the same command goes on. On one GPU give more --jobs,
XLA_PYTHON_CLIENT_PREALLOCATE=false and a JAX_COMPILATION_CACHE_DIR.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
import warnings

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from studies import STUDIES, Settings, Study, color, cost, settings, spanning
from tqdm import tqdm

from twinflow_jax import arguments, images
from twinflow_jax import config as configs
from twinflow_jax.training import setup

EVALUATIONS = ("1", "2", "4")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training. method: "start" for the velocities that the others start from. share: of the
    study's steps."""

    method: str
    trial: int
    seed: int
    share: float = 1.0

    def folder(self, out: pathlib.Path) -> pathlib.Path:
        name = str(self.seed) if self.share == 1 else f"{self.seed}_{self.share:g}"
        return (out / self.method / f"{self.trial:02d}" / name).resolve()

    def scores(self, out: pathlib.Path) -> dict[str, dict[str, float]] | None:
        """By evaluations; None where it did not come to its end."""
        file = self.folder(out) / "scores.json"
        return json.loads(file.read_text()) if file.exists() else None

    def overrides(self, study: Study, out: pathlib.Path) -> Settings:
        """Of the study's config."""
        if self.method == "start":
            steps = {"train.steps": study.start, "train.flow_matching_steps": study.start}
            return study.shared | steps
        folder = Run("start", 0, self.seed).folder(out)
        start = str(folder / "run") if isinstance(study.start, int) else study.start
        budget = self.share * study.steps * cost(study, next(iter(study.methods)))
        steps = round(budget / cost(study, self.method, self.trial))
        chosen = spanning(settings(study, self.method, self.trial), steps)
        if "data.pairs" in chosen:
            chosen["data.pairs"] = str(folder / pairs_of(study))
        return study.shared | chosen | {
            "train.steps": steps, "train.flow_matching_steps": 0, "train.init_from": start,
        }

    def changes(self, study: Study, out: pathlib.Path) -> list[str]:
        """Of the study's config, as `key=value`."""
        chosen = self.overrides(study, out) | {
            "train.seed": self.seed, "train.checkpoint_every": 10**6, "train.sample_every": 10**6,
            "sample.score_count": 0, "train.loggers": (),
        }
        return [f"{key}={value}" for key, value in chosen.items()]


def pairs_of(study: Study) -> str:
    """The name that `sample` gives the pairs of a study's start."""
    return f"pairs_run_step{study.start}_mul32nfe_seed0.safetensors"


def do(run: Run, study: Study, out: pathlib.Path) -> None:
    """Trains and scores one run; the log of both is in its folder."""
    folder = run.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    work, table = folder / "run", folder / "table.json"
    evaluations = ",".join(EVALUATIONS if run.share == 1 else EVALUATIONS[:1])
    chosen, commands = run.overrides(study, out), []
    if "data.pairs" in chosen and not pathlib.Path(chosen["data.pairs"]).exists():
        commands.append([
            "-m", "twinflow_jax.sample", "--checkpoint", chosen["train.init_from"], "--pairs",
            "--count", "500", "--steps", "32", "--style", "mul",
            "--out", str(pathlib.Path(chosen["data.pairs"]).parent),
        ])
    commands += [
        ["-m", "twinflow_jax.train", "--config", study.config, "--workdir", str(work),
         *(f"--config.{change}" for change in run.changes(study, out))],
        study.judge.command(str(work), evaluations, str(table)),
    ]
    with open(folder / "log", "w") as log:
        for command in commands:
            command = [sys.executable, *command]
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
                return  # the same command tries again
    scores = {str(row["nfe"]): row for row in json.loads(table.read_text())["scores"]}
    (folder / "scores.json").write_text(json.dumps(scores, indent=1))
    if run.method != "start":
        shutil.rmtree(work / "checkpoints", ignore_errors=True)


def ranking(study: Study, out: pathlib.Path, runs: list[Run]) -> dict[int, float]:
    """Distances at one evaluation of a method's runs that are done, by trial, the lowest first."""
    found, (distance, _) = {run.trial: run.scores(out) for run in runs}, study.judge.distance
    distances = {trial: scores["1"][distance] for trial, scores in found.items() if scores}
    return dict(sorted(distances.items(), key=lambda item: item[1]))


def measured(study: Study, run: Run, out: pathlib.Path) -> tuple[int, float, float]:
    """(steps, seconds of them, bytes that the compiled step holds) of a run that is done."""
    line = (run.folder(out) / "run" / "speed.jsonl").read_text().splitlines()[-1]
    speed = json.loads(line)
    parsed = configs.parse(study.config, run.changes(study, out))
    prepared = setup.prepare(parsed, jax.devices()[:1])
    steps = [prepared.lower(phase).compile().memory_analysis() for phase in prepared.phases]
    held = max(one.argument_size_in_bytes + one.temp_size_in_bytes for one in steps)
    return speed["step"], speed["useful_seconds"], held


def collect(
    study: Study, out: pathlib.Path, chosen: list[tuple[str, int]], seeds: list[int]
) -> list[dict]:
    """A row for each setting: scores by evaluations and name, each a list over seeds."""
    rows = []
    for method, trial in chosen:
        done = [run for seed in seeds if (run := Run(method, trial, seed)).scores(out)]
        if not done:
            continue
        scores = [run.scores(out) for run in done]
        values = {
            nfe: {name: [one[nfe][name] for one in scores]
                  for name, value in scores[0][nfe].items() if isinstance(value, float)}
            for nfe in EVALUATIONS
        }
        steps, seconds, held = measured(study, done[0], out)
        rows.append({
            "method": method, "trial": trial, "seeds": len(done), "scores": values,
            "steps": steps, "seconds": seconds, "bytes": held,
            "cost": 3.0 if method == "start" else cost(study, method, trial),
            "settings": {k: v for k, v in settings(study, method, trial).items()
                         if v != settings(study, method, 0).get(k)},
        })
    distance, _ = study.judge.distance
    return sorted(rows, key=lambda row: statistics.mean(row["scores"]["1"][distance]))


def table(study: Study, rows: list[dict]) -> str:
    """Markdown: mean and range over seeds."""
    def told(values: list[float], digits: int) -> str:
        mean = f"{statistics.mean(values):.{digits}f}"
        ends = f"{min(values):.{digits}f}-{max(values):.{digits}f}"
        return f"{mean} ({ends})" if len(values) > 1 else mean

    scores = study.judge.scores.items()
    lines = [
        "| method | seeds | forwards x steps | s | MB | "
        + " | ".join(f"{name}, {nfe} NFE" for nfe in EVALUATIONS for name, _ in scores) + " |",
        "|" + "---|" * (5 + len(scores) * len(EVALUATIONS)),
    ]
    for row in rows:
        name = row["method"] + (f" trial {row['trial']}" if row["trial"] else "")
        cells = [
            told(row["scores"][nfe][score], digits)
            for nfe in EVALUATIONS for score, digits in scores
        ]
        lines.append(
            f"| {name} | {row['seeds']} | {row['cost']:.2f} x {row['steps']} | "
            f"{row['seconds']:.0f} | {row['bytes'] / 1e6:.0f} | " + " | ".join(cells) + " |"
        )
    lines += [""] + [
        f"{row['method']} trial {row['trial']}: {row['settings']}" for row in rows if row["trial"]
    ]
    return "\n".join(lines) + "\n"


def plot(study: Study, rows: list[dict]):
    """The distance at each number of evaluations: a dot for each seed, a bar at their mean."""
    distance, said = study.judge.distance
    figure = Figure(figsize=(11, 0.3 * len(rows) + 1), layout="constrained")
    axes = figure.subplots(1, len(EVALUATIONS), sharex=True, sharey=True)
    for axis, nfe in zip(axes, EVALUATIONS, strict=True):
        for place, row in enumerate(rows):
            values = row["scores"][nfe][distance]
            shade = color(row["method"])
            axis.plot(values, [place] * len(values), ".", color=shade)
            axis.plot(statistics.mean(values), place, "|", color=shade, markersize=14)
        axis.set(title=f"{nfe} NFE", xlabel=said, xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    names = [row["method"] + (f" {row['trial']}" if row["trial"] else "") for row in rows]
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].invert_yaxis()
    return images.of_figure(figure)


def share(text: str) -> float:
    """Above 0 and at most 1."""
    if not 0 < (number := float(text)) <= 1:
        raise ValueError
    return number


def trials_of(text: str) -> dict[str, list[int]]:
    """Of `name,name:trial`: trials by name, none where a search finds them."""
    found: dict[str, list[int]] = {}
    for part in text.split(","):
        name, colon, trial = part.partition(":")
        found.setdefault(name, []).extend([int(trial)] if colon else [])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument(
        "--methods", type=trials_of,
        help="some of the study's, with commas between; NAME:TRIAL is one setting",
    )
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--steps", type=arguments.whole,
                        help="of the first method, in place of the study's")
    parser.add_argument("--share", type=share, default=1.0, help="of the steps, in the search")
    parser.add_argument("--finalists", type=int, default=1)
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--seconds", type=float, default=float("inf"),
                        help="no run begins later")
    args = parser.parse_args()
    # A method replaces the objective of its study's config, and means to.
    warnings.filterwarnings("ignore", "objective is of another kind")
    study, seeds, began = STUDIES[args.study], [int(s) for s in args.seeds.split(",")], time.time()
    if args.steps:
        study = dataclasses.replace(study, steps=args.steps)
    record, mine = args.out / "study.json", {"study": args.study, "steps": study.steps}
    if record.exists() and (other := json.loads(record.read_text())) != mine:
        parser.error(f"{args.out} is of {other['study']} in {other['steps']} steps, not of "
                     f"{args.study} in {study.steps}: give another --out")
    asked = args.methods or dict.fromkeys(study.methods)
    trials = {name: numbers or range(args.trials) for name, numbers in asked.items()}
    if unknown := [name for name in trials if name not in study.methods]:
        parser.error(f"--methods has {', '.join(unknown)}; choose from {', '.join(study.methods)}")

    args.out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(mine))

    def finish(runs: list[Run], what: str) -> None:
        def one(run: Run) -> None:
            if run.scores(args.out) is None and time.time() - began < args.seconds:
                do(run, study, args.out)

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            list(tqdm(pool.map(one, runs), total=len(runs), desc=what, unit="run"))

    if isinstance(study.start, int):
        finish([Run("start", 0, seed) for seed in seeds], "start")
    searched = {
        method: [Run(method, trial, seeds[0], args.share) for trial in numbers]
        for method, numbers in trials.items()
    }
    turns = itertools.zip_longest(*searched.values())
    finish([run for turn in turns for run in turn if run], "search")
    ranked = {method: ranking(study, args.out, runs) for method, runs in searched.items()}
    if missing := [method for method in trials if not ranked[method]]:
        raise SystemExit(
            f"no run of {', '.join(missing)} came to its end: see {args.out}/*/*/*/log"
        )
    chosen = [
        (method, trial) for method, ranks in ranked.items() for trial in trials[method]
        if trial in [*ranks][: args.finalists] or (trial == 0 and study.presets)
    ]
    finish([Run(*pair, seed) for seed in seeds for pair in chosen], "seeds")
    rows = collect(study, args.out, [("start", 0), *chosen], seeds)
    (args.out / "rows.json").write_text(json.dumps(rows, indent=1))
    (args.out / "table.md").write_text(table(study, rows))
    images.save(args.out / "table.png", plot(study, rows))
    print(table(study, rows))


if __name__ == "__main__":
    main()

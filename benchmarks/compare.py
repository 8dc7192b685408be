"""Objectives against each other: the same start, network, data, budget, search and judge.

    python benchmarks/compare.py digits --out runs/compare_digits
    python benchmarks/compare.py mnist --out runs/compare --methods twinflow,rcgm --trials 16
    python benchmarks/compare.py emoji --out runs/compare_emoji   # after configs/emoji.py's :flow
    python benchmarks/compare.py digits_lora --out runs/compare_lora --trials 4
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
beside. What is done stays in --out: the same command goes on. On one GPU give more --jobs,
XLA_PYTHON_CLIENT_PREALLOCATE=false and a JAX_COMPILATION_CACHE_DIR.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from tqdm import tqdm

from twinflow_jax import arguments, images, objectives
from twinflow_jax import config as configs
from twinflow_jax.objectives.config import Shared
from twinflow_jax.training import flops, setup

Settings = dict[str, object]  # overrides of a config, by key
EVALUATIONS = ("1", "2", "4")


@dataclasses.dataclass(frozen=True)
class Method:
    """Overrides of a study's config, and what a search draws in their place, by key."""

    own: Settings
    search: dict[str, tuple] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Judge:
    """command: `(run, evaluations with commas, file of scores) ->` arguments of Python. scores:
    those that stand in the table, and their digits. distance: the one that ranks, the lower the
    better, and what it is."""

    command: Callable[[str, str, str], list[str]]
    scores: dict[str, int]
    distance: tuple[str, str] = ("frechet", "Frechet distance")


@dataclasses.dataclass(frozen=True)
class Study:
    """What all methods share. start: steps that learn velocities first, or a run that did. steps:
    of the first method, after them; the others make as many forwards. rates, guidance: what a
    search takes the study's own times. shared: overrides of all, of the start too. presets: whether
    each trial 0 is one, which stands in the table beside what a search found."""

    config: str
    judge: Judge
    start: int | str
    steps: int
    methods: dict[str, Method]
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    guidance: tuple[float, ...] = (1.0,)
    shared: Settings = dataclasses.field(default_factory=dict)
    presets: bool = True

    @functools.cached_property
    def own(self) -> Settings:
        """The config's values and the shared ones, by key."""
        return configs.flatten(configs.load(self.config).to_dict()) | self.shared


def method(preset: dict[str, object], **search: tuple) -> Method:
    """Of an objective's fields, and of those that a search draws."""
    keyed = lambda fields: {f"objective.{key}": value for key, value in fields.items()}
    return Method(keyed(preset), keyed(search))


def rivals(guidance: float) -> dict[str, Method]:
    """Every objective, TwinFlow first."""
    twinflow = objectives.preset("released", distance="l2", guidance=guidance)
    released = {"teacher_decay": (0.99, 0.999)}
    preset = functools.partial(objectives.preset, guidance=guidance)
    jumps = {
        "diagonal": (0.25, 0.5, 0.75), "logit_normal": ((), (-0.4, 1.0), (0.4, 1.0)),
        "exponent": (0.5, 1.0),
    }
    return {
        "twinflow": method(
            twinflow, **released, rectify_weight=(1.0, 2.0, 3.0),
            ratios=((1.0, 1.0, 1.0, 1.0), (0.2, 0.3, 0.3, 0.2), (0.05, 0.45, 0.45, 0.05)),
        ),
        "rcgm": method(
            twinflow | {"ratios": (1.0, 1.0, 1.0, 0.0), "rectify_weight": 0.0}, **released,
            order=(1, 2), dt=(0.01, 0.03, 0.1),
            ratios=((1.0, 1.0, 1.0, 0.0), (0.2, 0.4, 0.4, 0.0), (0.05, 0.475, 0.475, 0.0)),
        ),
        "flow_matching": method(
            preset("flow_matching", teacher_decay=0.99), sample_weight=(True, False)
        ),
        "consistency_training": method(
            preset("consistency_training"), last_step=(1 / 256, 1 / 128, 1 / 32),
            limit=(0.3, 1.0, 4.0),
        ),
        "consistency_distillation": method(
            preset("consistency_distillation"), step=(1 / 128, 1 / 64, 1 / 16),
            limit=(0.3, 1.0, 4.0),
        ),
        "scm": method(
            preset("scm"), limit=(0.03, 0.1, 1.0), logit_normal=((), (-1.0, 1.4), (0.0, 1.4))
        ),
        "shortcut": method(preset("shortcut"), diagonal=(0.5, 0.75, 0.875)),
    } | {
        name: method(preset(name), **jumps)
        for name in ("meanflow", "meanflow_difference", "improved_meanflow", "alphaflow")
    } | {
        "twin_meanflow": method(
            preset("twin_meanflow"), **jumps, twin_share=(0.05, 0.1, 0.2),
            rectify_weight=(0.05, 0.1, 0.3),
        )
    } | {
        "vsd": matching("vsd", guidance), "dmd": matching("dmd", guidance, regression_weight=0.0),
        "dmd2": matching("dmd2", guidance), "sid": matching("sid", guidance),
    }


def matching(preset: str, guidance: float, **fields: float) -> Method:
    """Of the scores of two networks, the data's guided as much as a moving teacher comes to."""
    guided = objectives.preset(preset, real_guidance=1 / (1 - guidance), **fields)
    own = method(guided, fake_learning_rate=(1e-4, 3e-4, 1e-3), real_guidance=(1.0, 1.5, 2.0))
    return Method(own.own | {"optimizer.learning_rate": 2e-4}, own.search)


def regressed(guidance: float) -> dict[str, Method]:
    """DMD with its regression, on noise and what the start makes of it, without guidance."""
    dmd = matching("dmd", guidance)
    return {"dmd_pairs": Method(dmd.own | {"data.pairs": "the start's"}, dmd.search)}


def adapters(guidance: float, *rates: float) -> dict[str, Method]:
    """Ways to train adapters (LoRA), and all weights first. guidance: as its targets come to it,
    1 being none: a moving teacher's is 1 / (1 - g), a frozen one's 1 + g. rates: beside .001."""
    moving, frozen = 1 - 1 / guidance, guidance - 1

    def one(
        rank: int, times: str = "second_embedder", order: int = 2, teacher: float = 0.99,
        target: str = "sampled",
    ) -> Method:
        fields = objectives.preset(
            "released", distance="l2", order=order, teacher_decay=teacher, target_time=target,
            guidance=frozen if teacher == 1 else moving,
        )
        gated = {"adapter.whole": ("gated_time_embedder/.*",)} if times == "gated" else {}
        return Method(method(fields).own | gated | {
            "model.time_conditioning": times, "adapter.rank": rank,
            "optimizer.learning_rate": 1e-3,
        }, {"optimizer.learning_rate": rates})

    return {
        "full": one(0), "rank 4": one(4), "rank 16": one(16), "rank 64": one(64),
        "half_r": one(16, "half_r"), "gated": one(16, "gated"),
        "student teaches": one(16, teacher=0.0), "base teaches": one(16, teacher=1.0),
        "order 1": one(16, order=1), "order 1 and base teaches": one(16, order=1, teacher=1.0),
        "order 1 and gated": one(16, "gated", 1),
        "order 1 to 0": one(16, order=1, teacher=1.0, target="zero"),
        "order 1 to 0 and half_r": one(16, "half_r", 1, 1.0, "zero"),
    }


def evaluate(*which: str) -> Callable[[str, str, str], list[str]]:
    """`twinflow evaluate`, of so much."""
    return lambda run, steps, file: [
        "-m", "twinflow_jax.evaluate", *which, "--checkpoint", run, "--steps", steps,
        "--json", file,
    ]


CLASSES = Judge(evaluate("classes"), {"accuracy": 3, "frechet": 1, "diversity": 2})
CAPTIONS = Judge(
    evaluate(
        "captions", "--records", "data/emoji32/held_out_concepts",
        "--train-records", "data/emoji32/train", "--features", "features.safetensors",
    ),
    {"retrieval": 3, "frechet": 1, "diversity": 2},
)
EDITS = Judge(
    lambda run, steps, file: [
        str(pathlib.Path(__file__).with_name("edits.py")), f"{run}:{steps}", "--json", file,
    ],
    {"right": 3, "another instruction": 3, "error": 4}, ("error", "mean square error"),
)
STUDIES = {
    "digits": Study("configs/digits.py", CLASSES, 1000, 2000, rivals(0.0) | regressed(0.0)),
    "digits_lora": Study(
        "configs/digits.py", CLASSES, 3000, 800, adapters(2.0, 1e-4, 3e-4, 3e-3),
        presets=False, shared={
            "model.name": "dit", "model.sample_shape": (8, 8, 1), "model.patch": 2,
            "model.width": 64, "model.depth": 2, "objective.guidance": 0.0,
            "train.condition_dropout": 0.1, "data.batch_size": 64,
        },
    ),
    "mnist": Study(
        "configs/mnist.py:released", CLASSES, 2000, 8000, rivals(0.25) | regressed(0.25),
        rates=(1.0, 2.0), guidance=(1.0, 1.5),
    ),
    "emoji": Study(
        "configs/emoji.py", CAPTIONS, "runs/emoji_flow", 6000, rivals(0.5),
        rates=(1.0, 2.0), guidance=(1.0, 1.5),
    ),
    "emoji_lora": Study(
        "configs/emoji.py", CAPTIONS, "runs/emoji_flow", 400, adapters(2.0, 3e-4, 3e-3),
        shared={"optimizer.warmup": 20}, presets=False,
    ),
    "edits_lora": Study(
        "configs/emoji_edit.py", EDITS, 2400, 300, adapters(1.0, 3e-4, 3e-3),
        presets=False, shared={
            "pipeline": "random", "train.init_from": "", "data.name": "digits", "data.records": (),
            "data.text_tokens": 24, "model.sample_shape": (8, 8, 3), "model.patch": 2,
            "model.layers": 3, "model.heads": 4, "model.head_dim": 16,
            "model.rope_axes": (4, 6, 6), "model.text_width": 48, "train.ema_decay": 0.99,
            "optimizer.learning_rate": 2e-3, "optimizer.warmup": 20, "objective.guidance": 0.0,
        },
    ),
}


def settings(study: Study, name: str, trial: int) -> Settings:
    """Of one trial, no two of which are alike; trial 0 is the method's own, or the start's none."""
    if name == "start":
        return {}
    chosen = study.methods[name]
    if trial == 0:
        return chosen.own
    times = lambda key, by: {key: [(study.own | chosen.own)[key] * factor for factor in by]}
    space = times("optimizer.learning_rate", study.rates) | chosen.search
    if "objective.guidance" in chosen.own:
        space |= times("objective.guidance", study.guidance)
    points = list(itertools.product(*space.values()))
    random.Random(name).shuffle(points)
    return chosen.own | dict(zip(space, points[(trial - 1) % len(points)], strict=True))


def cost(study: Study, name: str, trial: int = 0) -> float:
    """Forward-equivalents of a step, of its batch: a role's rows cost more than another's."""
    changes = study.shared | settings(study, name, trial) | {"train.init_from": "start"}
    run = configs.parse(study.config, [f"{key}={value}" for key, value in changes.items()])
    return forwards(turns_of(run.objective), run.data.batch_size)


def turns_of(config: Shared) -> list[objectives.Objective]:
    """The objective of each step of a cycle."""
    return [objectives.Objective(config, learns) for learns in config.cycle]


def forwards(turns: list[objectives.Objective], rows: int) -> float:
    """Forward-equivalents of a step, of its batch, in the mean over turns."""
    worth = [flops.worth(flops.Forward(1, 0), flops.calls(turn, rows, (2,))) for turn in turns]
    return statistics.mean(worth) / rows


def spanning(chosen: Settings, steps: int) -> Settings:
    """Settings whose schedules are of a whole training of so many steps."""
    parts = {"objective.anneal_steps": steps, "objective.warmup": steps // 10}
    return chosen | {key: span for key, span in parts.items() if chosen.get(key)}


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
            color = "tab:orange" if row["method"] == next(iter(study.methods)) else "tab:blue"
            axis.plot(values, [place] * len(values), ".", color=color)
            axis.plot(statistics.mean(values), place, "|", color=color, markersize=14)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--methods", help="some of the study's, with commas between")
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
    study, seeds, began = STUDIES[args.study], [int(s) for s in args.seeds.split(",")], time.time()
    if args.steps:
        study = dataclasses.replace(study, steps=args.steps)
    methods = args.methods.split(",") if args.methods else list(study.methods)
    if unknown := [name for name in methods if name not in study.methods]:
        parser.error(f"--methods has {', '.join(unknown)}; choose from {', '.join(study.methods)}")

    def finish(runs: list[Run], what: str) -> None:
        def one(run: Run) -> None:
            if run.scores(args.out) is None and time.time() - began < args.seconds:
                do(run, study, args.out)

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            list(tqdm(pool.map(one, runs), total=len(runs), desc=what, unit="run"))

    if isinstance(study.start, int):
        finish([Run("start", 0, seed) for seed in seeds], "start")
    searched = {
        method: [Run(method, trial, seeds[0], args.share) for trial in range(args.trials)]
        for method in methods
    }
    finish([run for turn in zip(*searched.values(), strict=True) for run in turn], "search")
    ranked = {method: ranking(study, args.out, runs) for method, runs in searched.items()}
    if missing := [method for method in methods if not ranked[method]]:
        raise SystemExit(
            f"no run of {', '.join(missing)} came to its end: see {args.out}/*/*/*/log"
        )
    chosen = [
        (method, trial) for method in methods
        for trial in dict.fromkeys([*[*ranked[method]][: args.finalists], *[0] * study.presets])
    ]
    finish([Run(*pair, seed) for seed in seeds for pair in chosen], "seeds")
    rows = collect(study, args.out, [("start", 0), *chosen], seeds)
    (args.out / "rows.json").write_text(json.dumps(rows, indent=1))
    (args.out / "table.md").write_text(table(study, rows))
    images.save(args.out / "table.png", plot(study, rows))
    print(table(study, rows))


if __name__ == "__main__":
    main()

"""The paper's ablations as small runs on 8x8 digits, with plots.

    python benchmarks/ablations.py --out docs/images [--steps 2000] [--seeds 2] [--json FILE]

* lambda (its figure 4a): a twin share of 0 to 0.8, in the `paper` form (equations as written)
  and with the released roles (one_step and adversarial rows half of the share each);
* with and without the twin losses (4b): the released roles against RCGM, over training;
* evaluations 1 to 32 over training (4c): the released roles, any-step style, no fresh noise.

Network and settings of configs/digits.py; released roles with plain L2 and no guidance. Scores
are the judge's for 1,000 samples: accuracy and Frechet distance. About 15 minutes on 2 cores.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from tqdm import tqdm  # noqa: E402

from twinflow_jax import config as configs  # noqa: E402
from twinflow_jax import data, evaluation, images, models, objectives  # noqa: E402
from twinflow_jax.config import Run, Train  # noqa: E402
from twinflow_jax.evaluation import sample_labels  # noqa: E402
from twinflow_jax.sampling import generate, make_grid  # noqa: E402
from twinflow_jax.training import inputs, optimizers, state, step  # noqa: E402

SHARES = (0.0, 0.1, 0.2, 1 / 3, 0.5, 0.65, 0.8)
PLAIN = {"guidance": 0.0, "distance": "l2"}
FORMS = {
    "paper": lambda share: objectives.preset("paper", twin_share=share),
    "roles": lambda share: objectives.preset(
        "released", ratios=(share / 2, (1 - share) / 2, (1 - share) / 2, share / 2), **PLAIN
    ),
}
EVALUATIONS = (1, 2, 4, 8, 16, 32)
MARKS = 8  # moments of training that are scored
Curve = dict[int, dict[int, dict[str, float]]]  # step -> evaluations -> scores


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all runs share."""

    described: Run
    dataset: data.Dataset
    judge: evaluation.ClassJudge
    steps: int

    def run(self, objective: dict, seed: int, nfe: tuple[int, ...], marks: int) -> Curve:
        """Trains one objective; scores `marks` moments, evenly spaced, the last at the end."""
        model = models.build(self.described.model)
        built = objectives.build(objective)
        optimizer = optimizers.create(self.described.optimizer, self.steps)
        train = Train(seed=seed, ema_decay=self.described.train.ema_decay)
        advance = step.make_step(built, model.apply, optimizer, train)
        params = model.init(jax.random.key(seed))
        current = state.create(
            params, optimizer, built.config.teacher_decay, train.ema_decay
        )
        rows = inputs.labelled(
            self.dataset.train, {"label": np.arange(self.dataset.num_classes, dtype=np.int32)}
        )
        stream = data.batches(rows, self.described.data.batch_size, seed)
        labels, curve = sample_labels(1000, self.dataset.num_classes), {}
        for i in range(1, self.steps + 1):
            _, batch = next(stream)
            current, _ = advance(current, batch | {"null": model.null})
            if i % (self.steps // marks) == 0:
                weights = state.sampling_params(current)
                curve[i] = {}
                for n in nfe:
                    x = generate(
                        model, weights, labels, make_grid(n, style="any"), seed, progress=False
                    )
                    curve[i][n] = self.judge.score(x, labels)
        return curve


def mean(curves: list[Curve], score: str, at: int, nfe: int) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    values = [curve[at][nfe][score] for curve in curves]
    return float(np.mean(values)), float(np.std(values))


def plot_lambda(results: dict[str, list[Curve]], last: int):
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, score in zip(axes, ("accuracy", "frechet"), strict=True):
        for form in FORMS:
            points = [mean(results[f"{form} {s:.2f}"], score, last, 1) for s in SHARES]
            means, spreads = zip(*points, strict=True)
            axis.errorbar(SHARES, means, spreads, fmt="o-", label=form)
        axis.set(xlabel="lambda (share of twin rows)", title=f"1 NFE {score}")
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8)
    return images.of_figure(figure)


def plot_over_training(results: dict[str, list[Curve]], series, real):
    """One line per (label, run, evaluations) of `series`."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, score in zip(axes, ("accuracy", "frechet"), strict=True):
        for label, run, nfe in series:
            marks = list(results[run][0])
            axis.plot(marks, [mean(results[run], score, i, nfe)[0] for i in marks], "o-",
                      label=label, markersize=3)
        axis.axhline(real[score], color="grey", linestyle=":")
        axis.set(xlabel="steps", title=score)
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8)
    return images.of_figure(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for the plots")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", help="write all scores there")
    args = parser.parse_args()
    if args.steps % MARKS:
        parser.error(f"--steps must divide by {MARKS}")

    described = configs.parse(str(pathlib.Path(__file__).parents[1] / "configs" / "digits.py"))
    dataset = data.load("digits")
    bench = Bench(described, dataset, evaluation.ClassJudge.create(dataset), args.steps)
    runs = {
        f"{form} {share:.2f}": (make(share), (1,), 1)
        for form, make in FORMS.items()
        for share in SHARES
    }
    runs["TwinFlow"] = (objectives.preset("released", **PLAIN), EVALUATIONS, MARKS)
    runs["RCGM"] = (objectives.preset("rcgm", **PLAIN), EVALUATIONS, MARKS)
    results = {}
    for name, (objective, nfe, marks) in (bar := tqdm(runs.items(), unit="run")):
        bar.set_description(name)
        results[name] = [bench.run(objective, seed, nfe, marks) for seed in range(args.seeds)]

    out, real, last = pathlib.Path(args.out), bench.judge.real, args.steps
    images.save(out / "ablation_lambda.png", plot_lambda(results, last))
    both = [(f"{name}, {n} NFE", name, n) for name in ("TwinFlow", "RCGM") for n in (1, 4)]
    images.save(out / "ablation_twin.png", plot_over_training(results, both, real))
    over = [(f"{n} NFE", "TwinFlow", n) for n in EVALUATIONS]
    images.save(out / "ablation_nfe.png", plot_over_training(results, over, real))

    print(f"{'run':>10}  NFE  accuracy         Frechet")
    for name, curves in results.items():
        for nfe in curves[0][last]:
            (a, da), (f, df) = (mean(curves, s, last, nfe) for s in ("accuracy", "frechet"))
            print(f"{name:>10}  {nfe:3d}  {a:.3f} +- {da:.3f}  {f:7.2f} +- {df:.2f}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(results))


if __name__ == "__main__":
    main()

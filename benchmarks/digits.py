"""Samples and CPU time on 8x8 digits, side by side with plain PyTorch.

    python benchmarks/digits.py [--steps 2000] [--seeds 3] [--json FILE]

Both sides train the same network (residual MLP 256 x 3, raw times) from the same weights on the
same batches of 128 with the tutorial's losses, order 2, no guidance, Adam 1e-3, teacher average
.99, each with noise of its own; RCGM is the first of the five losses alone. The teacher average
is what is sampled: 1 NFE, 1,000 samples from the same noise, scored by the same classifier.
The JAX side is the train step of `twinflow_jax.training`, the other one is
`torch_reference.Trainer`.

The whole process runs on one core. Time is CPU time of the process per step, the median over
blocks of steps; blocks of the two sides alternate, so that a busy machine slows both. Compiling,
each side's first block, batches and evaluation are not in it. Most of a step is float32
matrix products, so the ratio is first of all that of the two sides' matrix libraries on this
processor; their speeds are printed along. About 11 minutes in all.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

if hasattr(os, "sched_setaffinity"):  # before any library counts the cores
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
import torch_reference as reference  # noqa: E402

from twinflow_jax import data, evaluation, models, objectives  # noqa: E402
from twinflow_jax.config import Train  # noqa: E402
from twinflow_jax.objectives import twin  # noqa: E402
from twinflow_jax.training import state as train_state  # noqa: E402
from twinflow_jax.training import step as train_step  # noqa: E402

BATCH, BLOCK, RATE, SAMPLES = 128, 100, 1e-3, 1000
MODEL = {
    "name": "mlp", "sample_shape": (8, 8, 1), "width": 256, "depth": 3, "num_classes": 10,
    "times": "raw",
}
OBJECTIVES = {"TwinFlow": {"twin": True}, "RCGM": {"twin": False}}
SCORES = ("accuracy", "frechet", "diversity")


def rows_per_step(rows: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers (BATCH,) of each step's batch: a new permutation each epoch."""
    rng, order = np.random.default_rng(seed), np.empty(0, int)
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.permutation(rows)
        yield order[:BATCH]
        order = order[BATCH:]


class JaxSide:
    """This project's train step. x (B, 8, 8, 1) float32, labels (B,) int32."""

    name = "JAX"

    def __init__(self, model: models.Model, objective: objectives.Objective, params, seed: int):
        self.model = model
        optimizer = optax.adam(RATE)
        train = Train(seed=seed, ema_decay=0.0)
        step = train_step.make_step(objective, model.apply, optimizer, train)
        # A copy of the weights: the step gives its state's buffers away.
        params = jax.tree.map(lambda a: a.copy(), params)
        self.state = train_state.create(params, optimizer, objective.config.teacher_decay, 0.0)
        example = self._inputs(
            np.zeros((BATCH, *model.sample_shape), np.float32), np.zeros(BATCH, np.int32)
        )
        begin = time.process_time()
        self.step = step.lower(self.state, example).compile()
        self.compile_seconds = time.process_time() - begin

    def _inputs(self, x: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        return {"x": x, "cond": {"label": labels}, "null": self.model.null}

    def train(self, block: list[tuple[np.ndarray, np.ndarray]]) -> None:
        for x, labels in block:
            self.state, _ = self.step(self.state, self._inputs(x, labels))
        jax.block_until_ready(self.state)

    def samples(self, z: np.ndarray, labels: np.ndarray) -> np.ndarray:
        one_step = jax.jit(lambda *given: z - self.model.apply(*twin.generator_pass(*given)))
        return np.asarray(one_step(self.state.teacher.params, z, self.model.cond(labels)))


class TorchSide:
    """The same in eager PyTorch, as its users write it."""

    name = "PyTorch"
    compile_seconds = 0.0

    def __init__(self, model: models.Model, objective: objectives.Objective, params, seed: int):
        fields = model.config
        network = reference.MLP(
            fields.sample_shape, fields.width, fields.depth, fields.num_classes
        )
        network = reference.load_flax(network, params)
        self.trainer = reference.Trainer(network, objective.config, RATE)
        self.generator = torch.Generator().manual_seed(seed)

    def train(self, block: list[tuple[np.ndarray, np.ndarray]]) -> None:
        for x, labels in block:
            draws = reference.draw_tutorial(
                self.generator, len(x), x.shape[1:], self.trainer.config
            )
            self.trainer.step(
                torch.from_numpy(x), torch.from_numpy(labels).long(), None, draws
            )

    @torch.no_grad()
    def samples(self, z: np.ndarray, labels: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(z)
        velocity = self.trainer.teacher(
            z, *reference.one_and_zero(z), torch.from_numpy(labels).long()
        )
        return (z - velocity).numpy()


@dataclasses.dataclass
class Result:
    """Of one side, objective and seed. step_ms: CPU milliseconds of each block's steps."""

    objective: str
    side: str
    seed: int
    scores: dict[str, float]
    step_ms: list[float]
    compile_seconds: float


def compare(
    objective_name: str, seed: int, steps: int, dataset: data.Dataset, judge: evaluation.ClassJudge
) -> list[Result]:
    """Trains both sides in alternating blocks, and scores both."""
    model = models.create(MODEL)
    objective = objectives.build(
        objectives.preset("tutorial", guidance=0.0, **OBJECTIVES[objective_name])
    )
    params = model.init(jax.random.key(seed))
    sides = [side(model, objective, params, seed) for side in (JaxSide, TorchSide)]
    step_ms: dict[str, list[float]] = {side.name: [] for side in sides}
    rows, split = rows_per_step(len(dataset.train), steps, seed), dataset.train
    for first in range(0, steps, BLOCK):
        picks = [next(rows) for _ in range(min(BLOCK, steps - first))]
        block = [(split.x[pick], split.label[pick]) for pick in picks]
        for side in sides:
            begin = time.process_time()
            side.train(block)
            step_ms[side.name].append(1e3 * (time.process_time() - begin) / len(block))

    z = np.random.default_rng(seed + 1000).normal(size=(SAMPLES, *model.sample_shape))
    labels = evaluation.sample_labels(SAMPLES, dataset.num_classes)
    results = []
    for side in sides:
        x = np.clip(side.samples(z.astype(np.float32), labels), -1, 1)
        results.append(
            Result(
                objective_name, side.name, seed, judge.score(x, labels),
                step_ms[side.name][1:] or step_ms[side.name], side.compile_seconds,
            )
        )
    return results


def median_ms(results: list[Result]) -> float:
    return float(np.median(np.concatenate([result.step_ms for result in results])))


def report(results: list[Result]) -> str:
    """A table: mean and standard deviation over seeds, and the ratio of CPU times."""
    lines = [
        f"{'objective':10} {'side':8} {'accuracy':>14} {'Frechet':>14} {'diversity':>14} "
        f"{'CPU ms/step':>12} {'compile s':>10}"
    ]
    pick = lambda objective, side: [
        r for r in results if (r.objective, r.side) == (objective, side)
    ]
    for objective in OBJECTIVES:
        for side in (JaxSide.name, TorchSide.name):
            mine = pick(objective, side)
            cells = []
            for score in SCORES:
                values = [result.scores[score] for result in mine]
                cells.append(f"{np.mean(values):8.3f} ±{np.std(values):5.3f}")
            compiling = np.mean([result.compile_seconds for result in mine])
            lines.append(
                f"{objective:10} {side:8} {' '.join(cells)} {median_ms(mine):12.2f} "
                f"{compiling:10.1f}"
            )
        ratio = median_ms(pick(objective, JaxSide.name)) / median_ms(
            pick(objective, TorchSide.name)
        )
        lines.append(f"{objective:10} CPU time per step, JAX / PyTorch: {ratio:.2f}")
    for side in (JaxSide.name, TorchSide.name):
        pairs = zip(pick("TwinFlow", side), pick("RCGM", side), strict=True)
        ahead = [
            twinflow.scores["accuracy"] > rcgm.scores["accuracy"]
            and twinflow.scores["frechet"] < rcgm.scores["frechet"]
            for twinflow, rcgm in pairs
        ]
        lines.append(
            f"{side}: TwinFlow ahead of RCGM in accuracy and Frechet distance for "
            f"{sum(ahead)} of {len(ahead)} seeds"
        )
    return "\n".join(lines)


def matrix_speeds() -> dict[str, float]:
    """GFLOP/s of each side in products of (BATCH, width) and (width, width) float32 matrices."""
    width, repeats = MODEL["width"], 200
    rng = np.random.default_rng(0)
    a = rng.normal(size=(BATCH, width)).astype(np.float32)
    b = np.linalg.qr(rng.normal(size=(width, width)))[0].astype(np.float32)
    ours = jax.jit(lambda a, b: jax.lax.fori_loop(0, repeats, lambda _, x: x @ b, a))

    def theirs(a, b):
        for _ in range(repeats):
            a = a @ b
        return a

    speeds = {}
    for name, run, inputs in (
        (JaxSide.name, lambda *ab: ours(*ab).block_until_ready(), (a, b)),
        (TorchSide.name, theirs, (torch.from_numpy(a), torch.from_numpy(b))),
    ):
        run(*inputs)
        begin = time.process_time()
        for _ in range(10):
            run(*inputs)
        seconds = (time.process_time() - begin) / (10 * repeats)
        speeds[name] = 2 * BATCH * width**2 / seconds / 1e9
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path, help="where to write every number")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    dataset = data.load("digits")
    judge = evaluation.ClassJudge.create(dataset)
    results = []
    for seed in range(arguments.seeds):
        for objective in OBJECTIVES:
            results += compare(objective, seed, arguments.steps, dataset, judge)
            for result in results[-2:]:
                scores = ", ".join(f"{name} {result.scores[name]:.3f}" for name in SCORES)
                print(
                    f"seed {seed} {objective} {result.side}: {scores}, "
                    f"{median_ms([result]):.2f} ms",
                    file=sys.stderr,
                )
    print(report(results))
    real = ", ".join(f"{name} {judge.real[name]:.3f}" for name in SCORES)
    print(f"real held-out digits: {real}")
    speeds = matrix_speeds()
    print("matrix products: " + ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in speeds.items()))
    if arguments.json:
        record = {
            "steps": arguments.steps,
            "versions": {"jax": jax.__version__, "torch": torch.__version__},
            "matrix_gflops": speeds,
            "real": judge.real,
            "results": [dataclasses.asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

"""Every objective on two moons and a ring of eight Gaussians: energy distance of one-step samples.

    python benchmarks/toys.py --out docs/images/toys_rivals.png --json toys.json

Data, network, distance and optimizer are those of examples/toys.py. For each seed a network learns
velocities for 1,000 steps; every method goes on from there, for as many forward-equivalents as
TwinFlow makes in 2,000 steps (a pass with gradient is three, an exact derivative one). What is
sampled is an average of the weights (.99). Where there is a frozen network, it is the start. The
settings are the presets' own without guidance, L2 for TwinFlow and RCGM; distribution matching
trains the student at 2e-4, as in studies.py.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

import jax  # noqa: E402
import optax  # noqa: E402
import studies  # noqa: E402
import toys  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from tqdm import tqdm  # noqa: E402

from twinflow_jax import images, models, objectives  # noqa: E402
from twinflow_jax.config import Train  # noqa: E402
from twinflow_jax.training import state as training_state  # noqa: E402
from twinflow_jax.training import step as training_step  # noqa: E402

START, STEPS, CHUNK, AVERAGE = 1000, 2000, 20, 0.99
METHODS = studies.rivals(0.0)


def objective(name: str, steps: int) -> dict:
    """A method's fields, with schedules of the whole training."""
    own = studies.spanning(METHODS[name].own, steps).items()
    return {k.removeprefix("objective."): v for k, v in own if k.startswith("objective.")}


def turns_of(fields: dict) -> list[objectives.Objective]:
    return studies.turns_of(objectives.build(fields).config)


def budget(name: str) -> int:
    """The steps that it trains for."""
    cost = lambda name: studies.forwards(turns_of(objective(name, 100)), toys.BATCH)
    # Whole cycles, and whole chunks of them.
    return CHUNK * round(STEPS * cost("twinflow") / cost(name) / CHUNK)


def trainer(model: models.Model, data, fields: dict, rate: float):
    """`(start(params) -> state, advance(state, seed) -> state)`, of CHUNK steps."""
    turns = turns_of(fields)
    config, optimizer = turns[0].config, optax.adam(rate)
    auxiliary = {
        name: optax.adam(own["learning_rate"], *own["betas"])
        for name, own in config.auxiliary.items()
    }

    @jax.jit
    def start(params):
        return training_state.create(
            params, optimizer, config.teacher_decay, AVERAGE, auxiliary=auxiliary
        )

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state, seed):
        steps = [
            training_step.make_step(
                turn, model.apply, optimizer, Train(ema_decay=AVERAGE), seed=seed,
                auxiliary=auxiliary,
            )
            for turn in turns
        ]
        data_key = jax.random.split(jax.random.key(seed))[1]

        def cycle(state, _):
            for step in steps:
                x = data(jax.random.fold_in(data_key, state.step), toys.BATCH)
                state, _ = step(state, {"x": x, "cond": {}})
            return state, None

        return jax.lax.scan(cycle, state, length=CHUNK // len(turns))[0]

    return start, advance


def train(trainer, params, steps: int, seed: int):
    """The averaged weights after so many steps."""
    start, advance = trainer
    state = start(jax.tree.map(jax.numpy.copy, params))
    for _ in range(steps // CHUNK):
        state = advance(state, seed)
    return training_state.sampling_params(state)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the plot")
    parser.add_argument("--json", type=pathlib.Path, help="write all distances there")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    model, found = models.create(toys.NETWORK), {}
    bar = tqdm(total=len(toys.TOYS) * args.seeds * (len(METHODS) + 1), unit="run")
    for toy, data in toys.TOYS.items():
        first = trainer(model, data, objective("flow_matching", START), 1e-3)
        starts = []
        for seed in range(args.seeds):
            starts.append(train(first, model.init(jax.random.key(seed)), START, seed))
            bar.update()
        found[toy] = {"data": [toys.floor(data, seed) for seed in range(args.seeds)]}
        for name, method in METHODS.items():
            bar.set_description(f"{toy} {name}")
            steps = budget(name)
            rate = method.own.get("optimizer.learning_rate", 1e-3)
            mine, scores = trainer(model, data, objective(name, steps), rate), []
            for seed in range(args.seeds):
                params = train(mine, starts[seed], steps, seed)
                scores.append(toys.score(model, params, data, seed))
                bar.update()
            found[toy][name] = scores
            if args.json:
                args.json.write_text(json.dumps(found, indent=1))
    bar.close()
    print("| method | steps | " + " | ".join(toys.TOYS) + " |\n" + "|---" * 4 + "|")
    order = sorted(METHODS, key=lambda name: statistics.mean(found["ring"][name]))
    for name in ("data", *order):
        cells = [
            f"{statistics.mean(v):.4f} ({min(v):.4f}, {max(v):.4f})"
            for v in (found[toy][name] for toy in toys.TOYS)
        ]
        steps = "-" if name == "data" else str(budget(name))
        print(f"| {name} | {steps} | " + " | ".join(cells) + " |")
    images.save(args.out, plot(found, order))


def plot(found: dict, order: list[str]):
    """A dot for each seed, a bar at their mean."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (toy, distances) in zip(axes, found.items(), strict=True):
        for place, name in enumerate(order):
            color = studies.color(name)
            axis.plot(distances[name], [place] * len(distances[name]), ".", color=color)
            axis.plot(statistics.mean(distances[name]), place, "|", color=color, markersize=14)
        axis.set(title=toy, xlabel="energy distance at 1 NFE", xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(order)), order)
    axes[0].invert_yaxis()
    return images.of_figure(figure)


if __name__ == "__main__":
    main()

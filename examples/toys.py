"""TwinFlow against RCGM on two 2-D toys: two moons, and a ring of eight Gaussians.

    python examples/toys.py --out toys.png

trains both on both toys with a few seeds, prints a table of the energy distance between their
one-step samples and fresh data, and draws data, one-step samples, and the trajectories that
the TwinFlow network has learned from noise to data (real) and to its own samples (fake).

Data: centred, with unit variance per coordinate (by exact constants, not fitted ones), so that
distances are in units of that deviation. Before it, the moons are half circles of radius 1
with noise of deviation 0.05, and the Gaussians have deviation 0.1 on a circle of radius 1.4.

Energy distance: `2 E|X-Y| - E|X-X'| - E|Y-Y'|` with Euclidean norms between n = 4,000 samples
X and n fresh data points Y; the U-statistic, whose last two means leave out each point's pair
with itself. It is unbiased, so data against data gives about 0 of either sign (the rows
"data"). Each figure is the mean of 5 such draws of (X, Y).

Training: the tutorial's losses, all five (TwinFlow) or the first alone (RCGM): L2, order 2,
teacher average .99, no guidance; Adam at 1e-3, batch 256. The student is sampled, as there.

Expected, mean of 3 seeds at 3,000 steps (under 10 minutes on one CPU core):

    moons   RCGM 0.0040   TwinFlow 0.0004
    ring    RCGM 0.0022   TwinFlow 0.0007
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from tqdm import tqdm

from twinflow_jax import models, objectives, sampling
from twinflow_jax.config import Train
from twinflow_jax.training import state as training_state
from twinflow_jax.training import step as training_step

BATCH, SAMPLES, DRAWS, CHUNK = 256, 4000, 5, 100
METHODS = {"RCGM": False, "TwinFlow": True}  # the objective's field `twin`
NETWORK = {"name": "mlp", "sample_shape": (2,), "width": 128, "depth": 2, "num_classes": 0}


def moons(key: jax.Array, rows: int) -> Float[Array, "rows 2"]:
    """Two half circles that interleave; every point has an equal chance on either."""
    which, angle, noise = jax.random.split(key, 3)
    lower = jax.random.bernoulli(which, 0.5, (rows, 1))
    theta = jax.random.uniform(angle, (rows,), maxval=jnp.pi)
    arc = jnp.stack([jnp.cos(theta), jnp.sin(theta)], axis=-1)
    x = jnp.where(lower, jnp.array([1.0, 0.5]) - arc, arc)
    x = x + 0.05 * jax.random.normal(noise, x.shape)
    # Both moons are +-(arc - centre) + centre, so they have the same second moments about it.
    centre = jnp.array([0.5, 0.25])
    variance = jnp.array([1 / 2 + 1 / 4, 1 / 2 - 1 / jnp.pi + 1 / 16]) + 0.05**2
    return (x - centre) / jnp.sqrt(variance)


def ring(key: jax.Array, rows: int) -> Float[Array, "rows 2"]:
    """Eight narrow Gaussians, equally far apart on a circle around 0."""
    which, noise = jax.random.split(key)
    angle = jax.random.randint(which, (rows,), 0, 8) * (jnp.pi / 4)
    x = 1.4 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    x = x + 0.1 * jax.random.normal(noise, x.shape)
    return x / jnp.sqrt(1.4**2 / 2 + 0.1**2)


TOYS = {"moons": moons, "ring": ring}


def energy_distance(x: Float[np.ndarray, "n 2"], y: Float[np.ndarray, "m 2"]) -> float:
    """`2 E|X-Y| - E|X-X'| - E|Y-Y'|` between the rows of x and y (U-statistic, float64)."""

    def total(a: np.ndarray, b: np.ndarray) -> float:
        squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        return np.sqrt(np.maximum(squared, 0)).sum()

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n, m = len(x), len(y)
    return float(
        2 * total(x, y) / (n * m) - total(x, x) / (n * (n - 1)) - total(y, y) / (m * (m - 1))
    )


def trainer(
    model: models.Model, data: Callable[[jax.Array, int], Array], twin: bool
) -> tuple[Callable, Callable]:
    """`(start(seed) -> state, advance(state, seed) -> (state, metrics))`, both jitted.

    `advance` scans CHUNK steps. Weights, batches and draws are functions of (seed, step).
    """
    objective = objectives.build(objectives.preset("tutorial", twin=twin, guidance=0.0))
    optimizer = optax.adam(1e-3)

    @jax.jit
    def start(seed):
        params = model.init(jax.random.key(seed))
        return training_state.create(params, optimizer, objective.config.teacher_decay, 0.0)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state, seed):
        step = training_step.make_step(
            objective, model.apply, optimizer,
            Train(ema_decay=0.0), seed=seed,
        )
        data_key = jax.random.split(jax.random.key(seed))[1]

        def one(state, _):
            x = data(jax.random.fold_in(data_key, state.step), BATCH)
            return step(state, {"x": x, "cond": {}})

        return jax.lax.scan(one, state, length=CHUNK)

    return start, advance


def score(model: models.Model, params, data: Callable, seed: int) -> float:
    """Energy distance of one-step samples to data, over fresh draws of both."""
    grid, distances = sampling.few_step(1), []
    for draw in range(DRAWS):
        noise_key, data_key = jax.random.split(jax.random.key(1_000_000 + DRAWS * seed + draw))
        noise = jax.random.normal(noise_key, (SAMPLES, 2))
        x = sampling.sample(model.apply, params, noise, {}, grid, noise_key)
        distances.append(energy_distance(x, data(data_key, SAMPLES)))
    return float(np.mean(distances))


def floor(data: Callable, seed: int) -> float:
    """What `score` gives for data in the place of samples."""
    keys = [jax.random.split(jax.random.key(2_000_000 + DRAWS * seed + i)) for i in range(DRAWS)]
    return float(np.mean([energy_distance(*(data(key, SAMPLES) for key in pair)) for pair in keys]))


def run(seeds: int, steps: int) -> tuple[models.Model, list[dict], dict]:
    """Trains everything: (network, one record per run, parameters by (toy, method, seed))."""
    model = models.create(NETWORK)
    records, trained = [], {}
    total = len(TOYS) * len(METHODS) * seeds * steps
    with tqdm(total=total, unit="step", smoothing=0.05) as bar:
        for toy, data in TOYS.items():
            for seed in range(seeds):
                records.append(
                    {"toy": toy, "method": "data", "seed": seed,
                     "energy_distance": floor(data, seed)}
                )
            for method, twin in METHODS.items():
                start, advance = trainer(model, data, twin)
                for seed in range(seeds):
                    bar.set_description(f"{toy} {method} seed {seed}")
                    state, times = start(seed), []
                    for _ in range(steps // CHUNK):
                        began = time.perf_counter()
                        state, metrics = advance(state, seed)
                        jax.block_until_ready(metrics)
                        times.append((time.perf_counter() - began) / CHUNK)
                        bar.update(CHUNK)
                    trained[toy, method, seed] = state.params
                    records.append(
                        {"toy": toy, "method": method, "seed": seed,
                         "energy_distance": score(model, state.params, data, seed),
                         "ms_per_step": 1e3 * float(np.median(times))}
                    )
    return model, records, trained


def mean_distance(records: list[dict], toy: str, method: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    values = [
        r["energy_distance"] for r in records if r["toy"] == toy and r["method"] == method
    ]
    return float(np.mean(values)), float(np.std(values))


def table(records: list[dict]) -> str:
    """The records as text: mean, deviation and single values over seeds."""
    lines = [f"{'toy':<7}{'method':<10}{'energy distance':>18}   {'per seed':<30}{'ms/step':>9}"]
    for toy in TOYS:
        for method in ("data", *METHODS):
            mine = [r for r in records if r["toy"] == toy and r["method"] == method]
            mean, deviation = mean_distance(records, toy, method)
            each = " ".join(f"{r['energy_distance']:.5f}" for r in mine)
            speed = [r["ms_per_step"] for r in mine if "ms_per_step" in r]
            pace = f"{np.median(speed):9.1f}" if speed else ""
            lines.append(
                f"{toy:<7}{method:<10}{mean:>9.5f} +- {deviation:.5f}   {each:<30}{pace}"
            )
    return "\n".join(lines)


def draw(path: Path, model: models.Model, records: list[dict], trained: dict) -> None:
    """The figure: a row for each toy, points of seed 0, distances as in the table.

    Trajectories run from grey points (noise) to coloured ones in 100 steps with r = t.
    """
    ink, colours = "#30343b", {"RCGM": "#d9822b", "TwinFlow": "#2166ac", "fake": "#b2182b"}
    noise_key, data_key = jax.random.split(jax.random.key(3_000_000))
    noise = jax.random.normal(noise_key, (3000, 2))
    titles = (
        "data", "RCGM, 1 evaluation", "TwinFlow, 1 evaluation", "TwinFlow, real: t from 1 to 0",
        "TwinFlow, fake: t from \u22121 to 0",
    )
    figure = Figure(figsize=(15, 2.95 * len(TOYS) + 0.3), layout="constrained")
    axes = figure.subplots(len(TOYS), len(titles))
    dots = {"s": 3, "alpha": 0.45, "linewidths": 0}
    for row, (toy, data) in zip(axes, TOYS.items(), strict=True):
        row[0].scatter(*data(data_key, len(noise)).T, color=ink, **dots)
        for axis, method in zip(row[1:3], METHODS, strict=True):
            x = sampling.sample(
                model.apply, trained[toy, method, 0], noise, {}, sampling.few_step(1), noise_key
            )
            axis.scatter(*x.T, color=colours[method], **dots)
            axis.set_xlabel(
                f"energy distance {mean_distance(records, toy, method)[0]:.4f}", color=ink
            )
        for axis, fake in zip(row[3:], (False, True), strict=True):
            states = sampling.trajectory(
                model.apply, trained[toy, "TwinFlow", 0], noise[:160], {},
                sampling.make_grid(100, "mul", fake=fake), noise_key,
            )
            colour = colours["fake" if fake else "TwinFlow"]
            axis.plot(*states.transpose(2, 0, 1), color=colour, alpha=0.28, linewidth=0.8)
            axis.scatter(*states[0].T, s=6, color="#9aa0a8", linewidths=0)
            axis.scatter(*states[-1].T, s=11, color=colour, linewidths=0, zorder=3)
        row[0].set_ylabel(toy, fontsize=13, color=ink)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=12, color=ink)
    for axis in axes.flat:
        axis.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), xticks=[], yticks=[], aspect="equal")
        axis.spines[:].set_color("#d5d8dc")
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, trains, prints the table, and writes figure and numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000, help=f"a multiple of {CHUNK}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("toys.png"), help="the figure, PNG")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    args = parser.parse_args(arguments)
    if args.seeds < 1 or args.steps < CHUNK or args.steps % CHUNK:
        parser.error(f"--seeds is at least 1 and --steps a positive multiple of {CHUNK}")

    for path in filter(None, (args.out, args.json)):
        path.parent.mkdir(parents=True, exist_ok=True)

    model, records, trained = run(args.seeds, args.steps)
    print(table(records))
    if args.json:
        settings = {"steps": args.steps, "batch": BATCH, "network": NETWORK}
        args.json.write_text(json.dumps(settings | {"runs": records}, indent=1) + "\n")
    draw(args.out, model, records, trained)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()

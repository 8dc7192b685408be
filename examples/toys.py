"""TwinFlow against RCGM on two 2-D toys: two moons, and a ring of eight Gaussians.

    python examples/toys.py --out toys.png

trains four small networks per seed, prints the energy distance of their one-step samples to
fresh data, and draws data, one-step samples, and the real and the fake trajectory.

Data: both toys are centred with unit variance per coordinate (exact constants, not fitted), so
distances are in units of that standard deviation. The moons' points have noise 0.05 before that
scaling; the ring's eight Gaussians have standard deviation 0.1 on a circle of radius 1.4.

Energy distance: `2 E|X-Y| - E|X-X'| - E|Y-Y'|` with Euclidean norms, X n one-step samples and Y
n fresh data points; the U-statistic, whose two last means leave out the n pairs of a point with
itself. It is unbiased: around 0, of either sign, when both come from one distribution (the
column "data": another n points of data in the samples' place).

Training: the tutorial's losses (`twin` on: TwinFlow, off: RCGM), without guidance, L2, order 2,
teacher average .99, Adam at 1e-3, batch 256. The sampled weights are an average of their own.
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
from tqdm import tqdm

from twinflow_jax import models, objectives, sampling
from twinflow_jax.training import state as training_state
from twinflow_jax.training import step as training_step

BATCH, SAMPLES, CHUNK = 256, 4000, 100
METHODS = {"RCGM": False, "TwinFlow": True}
NETWORK = {
    "name": "mlp", "sample_shape": (2,), "width": 128, "depth": 2, "num_classes": 0,
    "times": "raw",
}


def moons(key: jax.Array, rows: int) -> Float[Array, "rows 2"]:
    """Two half circles that interleave, each point with equal chance on either."""
    which, angle, noise = jax.random.split(key, 3)
    lower = jax.random.bernoulli(which, 0.5, (rows,))
    theta = jax.random.uniform(angle, (rows,), maxval=jnp.pi)
    upper_moon = jnp.stack([jnp.cos(theta), jnp.sin(theta)], axis=-1)
    lower_moon = jnp.stack([1 - jnp.cos(theta), 0.5 - jnp.sin(theta)], axis=-1)
    x = jnp.where(lower[:, None], lower_moon, upper_moon)
    x = x + 0.05 * jax.random.normal(noise, x.shape)
    # With y = +-(sin(theta) - 1/4) + 1/4 and x = +-(cos(theta) - 1/2) + 1/2:
    variance = jnp.array([0.75, 0.5 + 1 / 16 - 1 / jnp.pi]) + 0.05**2
    return (x - jnp.array([0.5, 0.25])) / jnp.sqrt(variance)


def ring(key: jax.Array, rows: int) -> Float[Array, "rows 2"]:
    """Eight narrow Gaussians, equally far apart on a circle around 0."""
    which, noise = jax.random.split(key)
    angle = jax.random.randint(which, (rows,), 0, 8) * (jnp.pi / 4)
    x = 1.4 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    x = x + 0.1 * jax.random.normal(noise, x.shape)
    return x / jnp.sqrt(1.4**2 / 2 + 0.1**2)


TOYS = {"moons": moons, "ring": ring}


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """`2 E|X-Y| - E|X-X'| - E|Y-Y'|` between the rows of x and y (U-statistic, float64)."""

    def total(a: np.ndarray, b: np.ndarray) -> float:
        return sum(
            np.sqrt(((part[:, None] - b[None]) ** 2).sum(-1)).sum()
            for part in np.array_split(a, max(len(a) // 500, 1))
        )

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n, m = len(x), len(y)
    return float(
        2 * total(x, y) / (n * m) - total(x, x) / (n * (n - 1)) - total(y, y) / (m * (m - 1))
    )


def trainer(
    model: models.Model, data: Callable[[jax.Array, int], Array], twin: bool, ema_decay: float
) -> tuple[Callable, Callable]:
    """`(start(seed) -> state, advance(state, seed, n) -> (state, metrics))`, both jitted.

    `advance` runs n steps in one scan. The batch of a step is a function of (seed, step).
    """
    objective = objectives.build(objectives.preset("tutorial", twin=twin, guidance=0.0))
    optimizer = optax.adam(1e-3)
    decay = objective.config.teacher_decay

    @jax.jit
    def start(seed):
        params = model.init(jax.random.key(seed))
        return training_state.create(params, optimizer, decay, ema_decay)

    @functools.partial(jax.jit, static_argnames="n")
    def advance(state, seed, n: int):
        step = training_step.make_step(
            objective, model.apply, model.null_cond, optimizer,
            training_step.StepConfig(seed, 1, ema_decay, "empty"),
        )
        data_key = jax.random.fold_in(jax.random.key(seed), 2**31)

        def one(state, _):
            x = data(jax.random.fold_in(data_key, state.step), BATCH)
            return step(state, {"x": x, "cond": {}})

        return jax.lax.scan(one, state, length=n)

    return start, advance

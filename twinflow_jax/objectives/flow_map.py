"""Flow maps with one network and one residual: consistency models, MeanFlow, shortcut and RCGM.

The jump from t to r has the velocity F(x_t, t, r). It should be that of a first piece, from t to
s = t - alpha (t - r) with a known velocity w, and of the network's own jump over the rest. How far
it is from that, per unit of alpha, and the limit of short pieces:

    Delta   = (F - alpha w - (1 - alpha) F(x_t - (t - s) u, s, r)) / alpha
    Delta_0 = F - w + (t - r) dF/dt,   dF/dt along (u, 1, 0)

with u = w, or the network's own velocity (`along`). The loss is |F - sg(F - n(Delta))|^2, n being
`normaliser`. Rows stand in three roles: `diagonal` learns the velocity, F(x_t, t, t) on w, `jump`
the residual, and `twin` TwinFlow's twin losses (twin.py), with the same n of their errors. A
setting of the fields is a method; `PRESETS` (objectives/__init__.py) has the published ones by
name, and says what differs. RCGM's roles and guidance as released are in `twinflow`.

Sources: consistency models arXiv 2303.01469, sCM 2410.11081, shortcut 2410.12557, MeanFlow
2505.13447, improved MeanFlow 2512.02012, alpha-Flow 2510.20771, RCGM 2512.05150 (equation 1).
"""

import dataclasses

import jax
import jax.numpy as jnp

from twinflow_jax.arrays import Apply, Losses, Samples, Scalar, Times, Velocities
from twinflow_jax.errors import UserError
from twinflow_jax.keys import option
from twinflow_jax.objectives import distances, path, rcgm, twin
from twinflow_jax.objectives.batch import Batch
from twinflow_jax.objectives.config import Shared
from twinflow_jax.objectives.draws import (
    Counts,
    Draws,
    allocate,
    counts_of,
    normal,
    role_slices,
)

ROLES = ("diagonal", "jump", "twin")
SHORTEST = 1e-4  # a first piece: rows with less between t and r learn the velocity
FINEST = 7  # shortcut's jumps are 1, 1/2, ... 1/64; their halves go down to 2^-7


@dataclasses.dataclass(frozen=True)
class Config(Shared):
    """Which flow map is learned, and how."""

    form: str = "flow_map"
    teacher_decay: float = 0.0
    diagonal: float = option(0.5, "share of rows that learn velocities, r = t", least=0, most=1)
    target_time: str = option(
        "sampled", "r of the other rows: the smaller of two times, 0, or a step of a grid of "
        "powers of 1/2", choices=("sampled", "zero", "grid"),
    )
    logit_normal: tuple[float, ...] = option(
        (), "mean and deviation of the times' logits; none: uniform times"
    )
    derivative: str = option(
        "jvp", "of the network along the path: exact; a difference of two passes; or the "
        "residual of a first piece", choices=("jvp", "difference", "substeps"),
    )
    piece: str = option(
        "constant", "what `step` is, with substeps: a length, or a share alpha of the jump",
        choices=("constant", "ratio"),
    )
    step: float = option(
        0.01, "of the first piece (substeps), or to each side (difference)", above=0, most=1
    )
    last_step: float = option(
        0.0, "that `step` reaches after anneal_steps; 0: it stays", least=0, most=1
    )
    anneal: str = option(
        "exponential", "how it gets there", choices=("exponential", "sigmoid")
    )
    anneal_steps: int = option(0, "training steps that this takes", least=0)
    order: int = option(1, "jumps over the rest, with substeps", least=1)
    velocity: str = option(
        "data", "w: the data's, the teacher's, or the teacher's jump over the first piece",
        choices=("data", "teacher", "jump"),
    )
    along: str = option(
        "velocity", "u: w itself, or the network's own velocity", choices=("velocity", "own")
    )
    guidance: float = option(
        0.0, "classifier-free guidance built into w; 0 is none", least=0
    )
    normaliser: str = option(
        "none", "of the error: clip to +-limit; unit: over its root mean square + limit; power: "
        "rows weigh 1 / (sum of squares + limit)^exponent",
        choices=("none", "clip", "unit", "power"),
    )
    limit: float = option(1.0, "see normaliser", above=0)
    exponent: float = option(1.0, "of power", above=0)
    warmup: int = option(
        0, "training steps over which the derivative's weight rises from 0 to 1", least=0
    )
    twin_share: float = option(
        0.0, "share of rows that learn the twin losses, of TwinFlow; 0 is none", least=0, below=1
    )
    rectify_weight: float = option(1.0, "weight of the rectification loss of twin rows", least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.logit_normal and (len(self.logit_normal) != 2 or self.logit_normal[1] <= 0):
            raise UserError(
                f"objective.logit_normal is {self.logit_normal}: give a mean and a deviation "
                "above 0, or () for uniform times"
            )
        if bool(self.last_step) != bool(self.anneal_steps):
            raise UserError(
                f"objective.last_step is {self.last_step} and objective.anneal_steps "
                f"{self.anneal_steps}: give both, or neither"
            )
        if self.derivative != "substeps" and (self.order != 1 or self.anneal_steps):
            raise UserError(
                f"objective.order is {self.order} and objective.anneal_steps {self.anneal_steps}, "
                "which are of sub-steps: set objective.derivative=substeps, or leave both out"
            )
        if self.warmup and self.derivative == "substeps":
            raise UserError(
                "objective.warmup is of a derivative: set objective.derivative to jvp or difference"
            )
        if self.velocity == "jump" and self.derivative != "substeps":
            raise UserError(
                "objective.velocity=jump has a first piece: set objective.derivative=substeps"
            )
        if self.velocity == "teacher" and self.teacher_decay != 1:
            raise UserError(
                "objective.velocity=teacher needs a frozen one: set objective.teacher_decay=1, "
                "and train.init_from to what it was trained to"
            )
        if self.velocity == "jump" and self.teacher_decay == 1:
            raise UserError(
                "objective.velocity=jump is of a teacher that learns jumps, and a frozen one does "
                "not: set objective.teacher_decay below 1"
            )
        if self.twin_share and self.diagonal == 0 and self.target_time == "zero":
            raise UserError(
                "objective.twin_share compares with velocities, at r = t, and with "
                "objective.diagonal=0 and target_time=zero nothing trains them: give "
                "objective.diagonal a share"
            )

    @property
    def learns_jumps(self) -> bool:
        return self.diagonal < 1 or self.twin_share > 0

    @property
    def any_jumps(self) -> bool:
        return self.diagonal < 1 and self.target_time != "zero"

    @property
    def learns_fake(self) -> bool:
        return self.twin_share > 0

    @property
    def counts_steps(self) -> bool:
        return bool(self.anneal_steps or self.warmup)


def counts(batch_size: int, config: Config) -> Counts:
    """Rows per role of a batch."""
    base = 1 - config.twin_share
    return allocate(batch_size, {
        "diagonal": config.diagonal * base, "jump": (1 - config.diagonal) * base,
        "twin": config.twin_share,
    })


def draw(
    key: jax.Array, batch_size: int, sample_shape: tuple[int, ...], config: Config
) -> Draws:
    """Everything random in one step: noise, times t, and u of target times r = t - u t."""
    draws = {}
    for role, rows in counts(batch_size, config).items():
        if rows == 0:
            continue
        if role == "twin":
            draws[role] = twin.draw(jax.random.split(key, 5), rows, sample_shape)
            continue
        key, noise_key, *keys = jax.random.split(key, 4)
        draws[role] = {"z": normal(noise_key, rows, sample_shape)}
        if role == "jump" and config.target_time == "grid":
            level = jax.random.randint(keys[0], (rows,), 0, FINEST)
            steps = 2.0**level
            t = (1 + jnp.floor(jax.random.uniform(keys[1], (rows,)) * steps)) / steps
            draws[role] |= {"t": t, "u": 1 / (steps * t)}
            continue
        t = times(keys[0], rows, config)
        if role == "jump" and config.target_time == "sampled":
            other = times(keys[1], rows, config)
            t, r = jnp.maximum(t, other), jnp.minimum(t, other)
            draws[role]["u"] = 1 - r / jnp.maximum(t, jnp.finfo(jnp.float32).tiny)
        elif role == "jump":
            draws[role]["u"] = jnp.ones_like(t)
        draws[role]["t"] = t
    return draws


def times(key: jax.Array, rows: int, config: Config) -> Times:
    """Uniform on [0, 1), or with normal logits."""
    if not config.logit_normal:
        return jax.random.uniform(key, (rows,))
    mean, deviation = config.logit_normal
    return jax.nn.sigmoid(mean + deviation * jax.random.normal(key, (rows,)))


def loss(
    apply: Apply, params, teacher_params, batch: Batch, draws: Draws, config: Config,
    totals: Counts | None = None,
) -> tuple[Scalar, dict[str, Scalar]]:
    """The loss and its terms by name; arguments as in twinflow.loss."""
    rows = counts_of(draws, ROLES)
    total, at = sum((totals or rows).values()), role_slices(rows)
    frozen = jax.lax.stop_gradient(params)
    teacher = frozen if teacher_params is params else jax.lax.stop_gradient(teacher_params)
    terms = {}
    for role in draws:
        mine, part = draws[role], jax.tree.map(lambda a: a[at[role]], batch)  # noqa: B023
        if role == "twin":
            twins = twin.targets(apply, params, mine, part.cond)
            for name, (v_pred, target) in twins.items():
                error = jax.lax.stop_gradient(v_pred) - target
                terms[name] = jnp.sum(distance(v_pred, error, config)) / total
            terms["rectify"] *= config.rectify_weight
            continue
        z, t = mine["z"], mine["t"]
        x_t, w = path.interpolate(part.x, z, t), path.velocity(part.x, z)
        w = known_velocity(apply, teacher, x_t, t, w, part, config)
        if role == "diagonal":
            v_pred = apply(params, x_t, t, t, part.cond)
            error = jax.lax.stop_gradient(v_pred) - w
        else:
            v_pred, error = residual(
                apply, params, frozen if config.teacher_decay == 1 else teacher,
                x_t, w, t, t - mine["u"] * t, part, config,
            )
        terms[role] = jnp.sum(distance(v_pred, error, config)) / total
    return sum(terms.values()), terms


def known_velocity(
    apply: Apply, teacher, x_t: Samples, t: Times, v: Velocities, batch: Batch, config: Config
) -> Velocities:
    """w: the path's velocity v, or the teacher's, with `guidance (F(cond) - F(null))` added."""
    if config.guidance:
        with_cond, without = twin.instantaneous_pair(
            apply, teacher, x_t, (t, t), (batch.cond, batch.null_cond)
        )
        start = with_cond if config.velocity == "teacher" else v
        return start + config.guidance * (with_cond - without)
    return apply(teacher, x_t, t, t, batch.cond) if config.velocity == "teacher" else v


def residual(
    apply: Apply, params, second, x_t: Samples, w: Velocities, t: Times, r: Times,
    batch: Batch, config: Config,
) -> tuple[Velocities, Velocities]:
    """F(x_t, t, r), and Delta without gradient.

    second: weights of the network that jumps over the rest. w: the known velocity at x_t.
    """
    cond, frozen = batch.cond, jax.lax.stop_gradient(params)
    size = span(batch, config)
    if config.derivative == "substeps":
        # Rows with no room for a first piece learn the velocity (`rcgm.error`).
        length = jnp.maximum(size * (t - r), SHORTEST) if config.piece == "ratio" else size
        s = jnp.maximum(t - length, r)
        if config.velocity == "jump":
            w = jnp.where(path.expand(t < r + length, w), w, apply(second, x_t, t, s, cond))
        u = apply(frozen, x_t, t, t, cond) if config.along == "own" else w
        times_left = rcgm.equal_times(s, r, config.order)
        jumps = rcgm.integrate(apply, second, x_t - path.expand(length, x_t) * u, times_left, cond)
        v_pred = apply(params, x_t, t, r, cond)
        error = rcgm.error(jax.lax.stop_gradient(v_pred), jumps, w, t, r, length)
        return v_pred, jax.lax.stop_gradient(error)

    u = apply(frozen, x_t, t, t, cond) if config.along == "own" else w
    of_path = lambda weights: lambda x, time: apply(weights, x, time, r, cond)
    if config.derivative == "jvp":
        v_pred, slope = jax.jvp(of_path(params), (x_t, t), (u, jnp.ones_like(t)))
    else:
        v_pred = apply(params, x_t, t, r, cond)
        late, early = jnp.minimum(t + size, 1.0), jnp.maximum(t - size, r)
        at = lambda time: of_path(frozen)(x_t + path.expand(time - t, u) * u, time)
        slope = (at(late) - at(early)) / path.expand(jnp.maximum(late - early, SHORTEST), u)
    risen = jnp.minimum(batch.done / config.warmup, 1.0) if config.warmup else jnp.ones_like(t)
    error = v_pred - w + path.expand(risen * (t - r), w) * slope
    return v_pred, jax.lax.stop_gradient(error)


def span(batch: Batch, config: Config) -> Times:
    """`step` of each row, as annealed by now."""
    first = jnp.full(batch.x.shape[:1], config.step)
    if not config.anneal_steps:
        return first
    progress = jnp.minimum(batch.done / config.anneal_steps, 1.0)
    if config.anneal == "exponential":
        return config.step * (config.last_step / config.step) ** progress
    left = jax.nn.sigmoid(25.0 * (0.5 - progress))  # alpha-Flow's gamma
    return jnp.maximum(config.step * left, config.last_step)


def distance(v_pred: Velocities, error: Velocities, config: Config) -> Losses:
    """Of each row, with the gradient of its mean square: that of the normalised error."""
    axes, weight = tuple(range(1, error.ndim)), 1.0
    error = error.astype(jnp.float32)
    if config.normaliser == "clip":
        error = path.clip(error, config.limit)
    elif config.normaliser == "unit":
        size = jnp.sqrt(jnp.mean(jnp.square(error), axes, keepdims=True))
        error = error / (size + config.limit)
    elif config.normaliser == "power":
        weight = (jnp.sum(jnp.square(error), axes) + config.limit) ** -config.exponent
    target = jax.lax.stop_gradient(v_pred - error)
    return weight * distances.l2(v_pred, target)

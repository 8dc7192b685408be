"""TwinFlow as released: one batch, four roles, one network.

| role        | t       | r                         | what its rows learn                        |
|-------------|---------|---------------------------|--------------------------------------------|
| one_step    | 1       | 0                         | RCGM jump, and rectification               |
| multi_step  | sampled | t - U t min(0.05, kappa)  | guided RCGM near the diagonal              |
| any_step    | sampled | t - U t kappa, or 0       | guided RCGM                                |
| adversarial | -t'     | -t'                       | the flow of the model's own one-step samples |

any_step rows that jump to 0 (`target_time`) are the released role `one`, which its README asks for
in place of any_step at order 1.

Roles are static slices of the batch, so each network pass sees only the rows that use it: at
the released settings and order 2, 4.25 forwards of the batch, one of them with gradient.
RCGM (no adversarial rows, no rectification) and flow matching (only multi_step rows, kappa 0,
order 0) are values of the same Config.

Source: `training_step` of the released src/methodes/twinflow/twinflow.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.arrays import Apply, Samples, Scalar, Times, Velocities
from twinflow_jax.errors import UserError
from twinflow_jax.keys import option
from twinflow_jax.objectives import distances, path, rcgm, twin
from twinflow_jax.objectives.batch import Batch
from twinflow_jax.objectives.config import Twinned
from twinflow_jax.objectives.direction import direction
from twinflow_jax.objectives.draws import (
    Counts,
    Draws,
    allocate,
    counts_of,
    normal,
    role_slices,
    sample_times,
)
from twinflow_jax.objectives.passes import Carrier, Pass, together

ROLES = ("one_step", "multi_step", "any_step", "adversarial")


@dataclasses.dataclass(frozen=True)
class Config(Twinned):
    """Hyperparameters; the defaults are the `released` preset.

    The rectification loss is a mean over one_step rows.
    """

    form: str = "twinflow"
    order: int = option(
        2, "teacher sub-steps of a jump; 0: only multi_step and adversarial rows train, on "
        "velocities", least=0,
    )
    ratios: tuple[float, float, float, float] = option(
        (1.0, 1.0, 1.0, 1.0),
        "shares of the batch: one_step, multi_step, any_step, adversarial", least=0,
    )
    consistency_ratio: float = option(
        1.0, "kappa: target times reach down to t (1 - kappa); 0 leaves flow matching",
        least=0, most=1,
    )
    distance: str = option(
        "barron", "between a prediction and its target", choices=tuple(distances.DISTANCES)
    )
    barron_alpha: float = option(1.0, "shape of Barron's kernel; 2 is plain L2")
    barron_scale: float = option(1e-3, "scale of Barron's kernel", above=0)
    target_time: str = option(
        "sampled", "r of any_step rows, anywhere below t or 0", choices=("sampled", "zero")
    )
    sample_weight: bool = option(
        True, "whether rows weigh tan((1 - (|t| - |r|)) pi / 2.5) + 1 (adversarial ones: 1)"
    )
    guidance: float = option(
        0.8, "classifier-free guidance built into the velocity target; 0 is none", least=0
    )
    guidance_range: tuple[float, float] = option(
        (0.0, 1.0), "targets are guided where low < t < high", least=0, most=1
    )
    rectify_clip: float = option(1.0, "limit on fake minus real velocities; 0 is none", least=0)
    time_distribution: tuple[float, float, float] = option(
        (1.0, 1.0, 1.0), "(a, b, scale) of t ~ scale Beta(a, b)", above=0
    )
    image_free: bool = option(
        False, "train on the model's own one-step samples instead of data, with a frozen teacher"
    )
    merge_passes: bool = option(
        False,
        "passes that do not wait for each other share a call: order + 1 calls without gradient "
        "instead of order + 3, for a pass of the one_step rows more; the same loss, faster where "
        "many devices share the weights",
    )

    def __post_init__(self):
        super().__post_init__()
        if sum(self.ratios) <= 0:
            raise UserError(
                f"objective.ratios is {self.ratios}: give one above 0, for {', '.join(ROLES)}"
            )
        low, high = self.guidance_range
        if not low < high:
            raise UserError(
                f"objective.guidance_range is {self.guidance_range}; give low < high in [0, 1]"
            )
        if self.time_distribution[2] > 1:
            raise UserError(
                f"objective.time_distribution is {self.time_distribution}; times reach up to its "
                "last number: give 1 or less"
            )
        if self.image_free and self.teacher_decay != 1:
            raise UserError(
                "objective.image_free needs a frozen teacher: set objective.teacher_decay=1"
            )

    @property
    def learns_jumps(self) -> bool:
        return self.order >= 1 and self.consistency_ratio > 0

    @property
    def any_jumps(self) -> bool:
        any_step = self.ratios[ROLES.index("any_step")] > 0 and self.target_time == "sampled"
        return self.learns_jumps and any_step

    @property
    def learns_fake(self) -> bool:
        return self.ratios[ROLES.index("adversarial")] > 0

    @property
    def rectifies(self) -> bool:
        return self.rectify_weight > 0 and self.consistency_ratio == 1


def counts(batch_size: int, config: Config) -> Counts:
    """Rows per role of a batch."""
    return allocate(batch_size, dict(zip(ROLES, config.ratios, strict=True)))


def draw(
    key: jax.Array, batch_size: int, sample_shape: tuple[int, ...], config: Config
) -> Draws:
    """Everything random in one step: noise, times and target times of each role's rows."""
    draws = {}
    for role, rows in counts(batch_size, config).items():
        if rows == 0:
            continue
        key, *keys = jax.random.split(key, 6)
        role_draws = {"z": normal(keys[0], rows, sample_shape)}
        if role != "one_step":
            role_draws["t"] = sample_times(keys[1], rows, config.time_distribution)
        if role in ("multi_step", "any_step"):
            role_draws["u"] = jax.random.uniform(keys[2], (rows,))
        if role == "adversarial" or config.image_free:
            role_draws["z_generator"] = normal(keys[3], rows, sample_shape)
        if role == "one_step" and config.rectifies:
            rectify_key, time_key = jax.random.split(keys[4])
            role_draws["z_rectify"] = normal(rectify_key, rows, sample_shape)
            role_draws["t_rectify"] = jax.random.uniform(time_key, (rows,))
        draws[role] = role_draws
    return draws


def role_times(role: str, draws: dict[str, Array], config: Config) -> tuple[Times, Times]:
    """Times (t, r) of a role's rows."""
    if role == "one_step":
        ones = jnp.ones(draws["z"].shape[0], jnp.float32)
        return ones, jnp.zeros_like(ones)
    t = draws["t"]
    if role == "adversarial":
        return -t, -t
    if role == "any_step" and config.target_time == "zero":
        return t, jnp.zeros_like(t)
    kappa = config.consistency_ratio
    return t, t - draws["u"] * t * (min(0.05, kappa) if role == "multi_step" else kappa)


def weight(t: Times, r: Times) -> Float[Array, "B"]:
    """`tan((1 - (|t| - |r|)) pi / 2.5) + 1`: 4.08 at r = t, 1 for the jump from 1 to 0."""
    return jnp.tan((1 - (jnp.abs(t) - jnp.abs(r))) * jnp.pi / 2.5) + 1


def loss(
    apply: Apply, params, teacher_params, batch: Batch, draws: Draws, config: Config,
    totals: Counts | None = None,
) -> tuple[Scalar, dict[str, Scalar]]:
    """The released loss of one batch whose rows stand in ROLES order.

    draws: from `draw`, for exactly these rows. totals: rows per role of the whole batch when
    this is one micro-batch of it (default: it is whole); losses and terms of the micro-batches
    then add up to the whole batch's. Returns the loss and its terms by name, which add up to it.
    """
    present = [role for role in ROLES if role in draws]
    rows = counts_of(draws, ROLES)
    at = role_slices(rows)
    totals = totals or rows
    batch_rows = sum(totals.values())
    frozen = jax.lax.stop_gradient(params)
    teacher = frozen if teacher_params is params else jax.lax.stop_gradient(teacher_params)
    metric = distances.DISTANCES[config.distance](config.barron_alpha, config.barron_scale)

    times = [role_times(role, draws[role], config) for role in present]
    t = jnp.concatenate([time for time, _ in times])
    r = jnp.concatenate([target for _, target in times])
    z = jnp.concatenate([draws[role]["z"] for role in present])
    early = early_velocities(apply, frozen, teacher, batch, draws, t, z, config, at)
    x = batch.x  # the data end of each row's path
    if "generator" in early:  # of the last rows, or all: the model's own one-step samples
        samples = generator_noise(draws) - early["generator"]
        x = jnp.concatenate([x[: -samples.shape[0]], samples])
    x_t, v = path.interpolate(x, z, t), path.velocity(x, z)

    v_pred = apply(params, x_t, t, r, batch.cond)
    if config.guidance and rows["multi_step"] + rows["any_step"]:
        v = guided(apply, teacher, early, x_t, t, v, batch, config, at)

    first = at["one_step"]
    rectifies = config.rectifies and rows["one_step"] > 0
    twins = []
    if rectifies:
        v_one = early.get("one_step", v_pred[first])
        twins = twin.twin_passes(
            frozen, jax.lax.stop_gradient(z[first] - v_one), draws["one_step"]["z_rectify"],
            draws["one_step"]["t_rectify"], take(batch.cond, first),
        )

    target = v
    real = at["any_step"].stop  # the adversarial rows, last, learn no jumps
    carrier = Carrier(apply, twins if config.merge_passes else [])
    if config.learns_jumps and totals["one_step"] + totals["any_step"] and real:
        corrected = rcgm.target(
            carrier, frozen if config.teacher_decay == 1 else teacher,
            v_pred[:real], x_t[:real], v[:real], t[:real], r[:real],
            take(batch.cond, slice(real)), config,
        )
        target = jnp.concatenate([corrected, v[real:]])

    per_row = metric(v_pred, jax.lax.stop_gradient(target))
    trained = ROLES if config.order >= 1 else ("multi_step", "adversarial")
    denominator = batch_rows if config.order >= 1 else sum(totals[role] for role in trained)
    terms = {}
    for role in present:
        if role not in trained:
            continue
        role_loss = per_row[at[role]]
        if config.sample_weight and role != "adversarial":
            role_loss = role_loss * weight(t[at[role]], r[at[role]])
        terms[role] = jnp.sum(role_loss) / denominator

    if rectifies:
        v_fake, v_real = carrier.collect() if config.merge_passes else together(apply, twins)
        gap = path.clip(direction("twin", v_real, v_fake), config.rectify_clip)
        straight = jax.lax.stop_gradient(v_pred[first] - gap)
        terms["rectify"] = (
            config.rectify_weight
            * jnp.sum(metric(v_pred[first], straight)) / totals["one_step"]
        )
    return sum(terms.values(), jnp.float32(0)), terms


def take(tree, rows: slice):
    """Some rows of a pytree of arrays."""
    return jax.tree.map(lambda a: a[rows], tree)


def sampled_rows(config: Config, at) -> slice:
    """Rows whose data end is the model's own one-step sample: all in image-free training."""
    return slice(0 if config.image_free else at["adversarial"].start, at["adversarial"].stop)


def generator_noise(draws: Draws) -> Samples:
    """What the one-step samples of `sampled_rows` start from."""
    noise = [draws[role]["z_generator"] for role in ROLES if "z_generator" in draws.get(role, {})]
    return jnp.concatenate(noise)


def early_velocities(
    apply: Apply, frozen, teacher, batch: Batch, draws: Draws, t: Times, z: Samples,
    config: Config, at,
) -> dict[str, Float[Array, "_ ..."]]:
    """What can be computed before the training samples are known, without gradient.

    "generator": of the one-step samples of `sampled_rows`. With merge_passes, in the same call,
    also "with_cond" and "without" (guidance, where its rows are data) and "one_step" (the
    rectified rows' jump, which the pass with gradient computes again).
    """
    passes, mine = {}, sampled_rows(config, at)
    if mine.start < mine.stop:
        passes["generator"] = twin.generator_pass(
            frozen, generator_noise(draws), take(batch.cond, mine)
        )
    rows = slice(at["multi_step"].start, at["any_step"].stop)
    if config.merge_passes and config.guidance and not config.image_free and rows.start < rows.stop:
        x_t = path.interpolate(batch.x[rows], z[rows], t[rows])
        passes["with_cond"], passes["without"] = guidance_passes(
            teacher, x_t, t[rows], batch, rows
        )
    first = at["one_step"]
    if config.merge_passes and config.rectifies and first.start < first.stop:
        passes["one_step"] = twin.generator_pass(frozen, z[first], take(batch.cond, first))
    return dict(zip(passes, together(apply, list(passes.values())), strict=True))


def guidance_passes(
    teacher, x_t: Samples, t: Times, batch: Batch, rows: slice
) -> list[Pass]:
    """The teacher's velocities at (x_t, t, t) with the condition and without; x_t, t: of rows."""
    return twin.instantaneous(
        teacher, x_t, (t, t), (take(batch.cond, rows), take(batch.null_cond, rows))
    )


def guided(
    apply: Apply, teacher, early, x_t: Samples, t: Times, v: Velocities, batch: Batch,
    config: Config, at,
) -> Velocities:
    """Velocity targets with guidance on the multi_step and any_step rows.

    `v + g (F(cond) - F(null))` with the teacher's velocities at (x_t, t, t); image-free
    training has no data velocity to start from and takes `F(null) + g (F(cond) - F(null))`.
    One-step rows lie at t = 1, outside every released range, and are never guided.
    """
    rows = slice(at["multi_step"].start, at["any_step"].stop)
    low, high = config.guidance_range
    if "without" in early:
        with_cond, without = early["with_cond"], early["without"]
    else:
        passes = guidance_passes(teacher, x_t[rows], t[rows], batch, rows)
        with_cond, without = together(apply, passes)
    start = without if config.image_free else v[rows]
    inside = path.expand((t[rows] > low) & (t[rows] < high), v[rows])
    guided_rows = jnp.where(inside, start + config.guidance * (with_cond - without), v[rows])
    return jnp.concatenate([v[: rows.start], guided_rows, v[rows.stop :]])

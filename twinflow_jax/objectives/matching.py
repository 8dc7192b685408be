"""Distribution matching: a generator of one step is moved by the difference of two scores.

The student draws x = z - F(z, 1, 0). At x' = tau z' + (1 - tau) x, with fresh z' and tau, the
frozen start of the run (`teacher`) knows the data's velocity v_real, guided by
`v_null + g (v_cond - v_null)`, and an auxiliary network, `fake`, that of the student's samples,
v_fake. Per row, with m = direction.direction(rule, ...):

* student, "vsd" and "dmd": `|| x - stop_gradient(x + m) ||^2 / 2`;
* student, "sid": `m . ((x_real - x) - alpha (x_real - x_fake))`, with the gradient through x' and
  both networks (arXiv 2404.04057, algorithm 1; sum over numbers there, mean here);
* fake: flow matching on the student's samples, `|| F_fake(x'', t, t) - (z'' - x) ||^2`, with fresh
  z'' and t. It is never guided.

DMD adds a regression: `|| x(z) - y ||^2` of pairs (z, y), y being what the start draws from z in
many steps (latent L2 in place of its LPIPS). No other samples are used, only conditions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from twinflow_jax.arrays import Apply, Losses, Samples, Scalar
from twinflow_jax.errors import UserError
from twinflow_jax.keys import option
from twinflow_jax.objectives import distances, path, twin
from twinflow_jax.objectives.batch import Batch
from twinflow_jax.objectives.config import STUDENT, Shared
from twinflow_jax.objectives.direction import direction
from twinflow_jax.objectives.draws import Counts, Draws, normal, rows_of
from twinflow_jax.objectives.passes import together

ROLES = ("all",)
FAKE = "fake"


@dataclasses.dataclass(frozen=True)
class Config(Shared):
    """Hyperparameters; the defaults are the `dmd2` preset."""

    form: str = "matching"
    teacher_decay: float = 1.0
    rule: str = option("dmd", "how samples are moved", choices=("vsd", "dmd", "sid"))
    alpha: float = option(1.0, "of sid", least=0)
    tau: tuple[float, float] = option(
        (0.02, 0.98), "noise levels between which the scores are compared", least=0, most=1
    )
    real_guidance: float = option(
        1.0, "of the real score: v_null + g (v_cond - v_null); 1 is none", least=1
    )
    regression_weight: float = option(
        0.0, "of the squared distance to the pictures of pairs; 0: none", least=0
    )
    turns: str = option(
        "together", "together: the fake learns at every step, and from the student's own samples "
        "where that learns too; exclusive: each step is of one of the two, the student's first; "
        "fake_first: the student's last", choices=("together", "exclusive", "fake_first"),
    )
    every: int = option(5, "steps of a cycle; the student learns at one of them", least=1)
    fake_learning_rate: float = option(1e-4, "of the fake's optimizer", above=0)
    fake_betas: tuple[float, float] = option(
        (0.9, 0.999), "of the fake's optimizer", least=0, below=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.teacher_decay != 1:
            raise UserError(
                f"objective.teacher_decay is {self.teacher_decay}, but the real score is a frozen "
                "teacher's: set it to 1"
            )
        if not self.tau[0] < self.tau[1]:
            raise UserError(f"objective.tau is {self.tau}; give low < high in [0, 1]")
        if self.every == 1 and self.turns != "together":
            raise UserError(
                f"objective.every is 1, in which objective.turns={self.turns} never trains the "
                "fake: give 2 or more, or objective.turns=together"
            )

    @property
    def guided(self) -> str:
        return "objective.real_guidance" if self.real_guidance != 1 else ""

    @property
    def auxiliary(self) -> dict[str, dict[str, Any]]:
        """The fake score."""
        return {FAKE: {"learning_rate": self.fake_learning_rate, "betas": self.fake_betas}}

    @property
    def image_free(self) -> bool:
        """Conditions will do, but for pairs, which are pictures."""
        return not self.pairs

    @property
    def pairs(self) -> bool:
        """The regression's."""
        return self.regression_weight > 0

    @property
    def cycle(self) -> tuple[tuple[str, ...], ...]:
        """The student learns at one of `every` steps."""
        others = ((FAKE,),) * (self.every - 1)
        if self.turns == "together":
            return ((STUDENT, FAKE), *others)
        return ((STUDENT,), *others) if self.turns == "exclusive" else (*others, (STUDENT,))


def counts(batch_size: int, config: Config) -> Counts:
    """Rows per role of a batch: there is one role."""
    return {"all": batch_size}


def draw(
    key: jax.Array, batch_size: int, sample_shape: tuple[int, ...], config: Config
) -> Draws:
    """Everything random in one step, whoever learns."""
    keys, (low, high) = jax.random.split(key, 5), config.tau
    return {"all": {
        "z": normal(keys[0], batch_size, sample_shape),
        "z_score": normal(keys[1], batch_size, sample_shape),
        "tau": jax.random.uniform(keys[2], (batch_size,), minval=low, maxval=high),
        "z_fake": normal(keys[3], batch_size, sample_shape),
        "t_fake": jax.random.uniform(keys[4], (batch_size,)),
    }}


def loss(
    apply: Apply, params, teacher_params, batch: Batch, draws: Draws, config: Config,
    totals: Counts | None = None, learns: tuple[str, ...] = (STUDENT, FAKE),
) -> tuple[Scalar, dict[str, Scalar]]:
    """The losses of the networks that learn, means over rows; arguments as in `form.Form`."""
    total = (totals or {"all": rows_of(draws, "all")})["all"]
    mine, frozen = draws["all"], jax.lax.stop_gradient(params)
    student = (params if STUDENT in learns else frozen)[STUDENT]
    regresses = config.pairs and STUDENT in learns
    starts = [mine["z"]] + [batch.noise] * regresses
    v_one = together(apply, [twin.generator_pass(student, z, batch.cond) for z in starts])
    x, *drawn = (z - v for z, v in zip(starts, v_one, strict=True))
    per_row = {}
    if regresses:
        per_row["regression"] = config.regression_weight * distances.l2(drawn[0], batch.x)
    if STUDENT in learns:
        teacher = jax.lax.stop_gradient(teacher_params)
        per_row["matching"] = generator_loss(apply, teacher, frozen[FAKE], x, batch, mine, config)
    if FAKE in learns:
        per_row["fake"] = fake_loss(apply, params[FAKE], x, batch.cond, mine)
    terms = {name: jnp.sum(losses) / total for name, losses in per_row.items()}
    return sum(terms.values()), terms


def generator_loss(
    apply: Apply, real, fake, x: Samples, batch: Batch, draws: dict[str, jax.Array],
    config: Config,
) -> Losses:
    """Of each of the student's samples x. real, fake: weights of the scores, without gradient."""
    if config.rule != "sid":
        x, student = jax.lax.stop_gradient(x), x
    z, tau = draws["z_score"], draws["tau"]
    x_t, v = path.interpolate(x, z, tau), path.velocity(x, z)
    conds = [batch.cond] + [batch.null_cond] * (config.real_guidance != 1)
    passes = twin.instantaneous(real, x_t, (tau,) * len(conds), tuple(conds))
    [v_fake, v_real, *v_null] = together(
        apply, twin.instantaneous(fake, x_t, (tau,), (batch.cond,)) + passes
    )
    if v_null:
        v_real = v_null[0] + config.real_guidance * (v_real - v_null[0])
    move = direction(config.rule, v_real, v_fake, v, tau)
    if config.rule != "sid":
        return distances.l2(student, x + move) / 2
    away = -path.expand(tau, v) * (v_real - v)  # x_real - x
    product = move * (away - config.alpha * direction("vsd", v_real, v_fake, v, tau))
    return jnp.mean(product, axis=tuple(range(1, product.ndim)))


def fake_loss(apply: Apply, fake, x: Samples, cond, draws: dict[str, jax.Array]) -> Losses:
    """Flow matching of the fake on the student's samples x, each row's."""
    z, t = draws["z_fake"], draws["t_fake"]
    x = jax.lax.stop_gradient(x)
    v_fake = apply(fake, path.interpolate(x, z, t), t, t, cond)
    return distances.l2(v_fake, path.velocity(x, z))

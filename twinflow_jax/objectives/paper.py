"""TwinFlow as the paper writes its losses: two subsets of the batch, plain L2.

A share lambda of the rows (`twin`) learns the twin losses at (t, r) = (1, 0); the other rows
(`base`) learn RCGM at any (t, r). Per row, with v = z - x:

* `base` (equation 1): `|| ((t - r) F(x_t, t, r) - S) / dt - v ||^2`, S the teacher's jumps along
  t_1 = t - dt > t_2 > ... > r, each t_i uniform between r and t_{i-1};
* `adversarial` (L_adv): F(x', -t', -t') on z' - x_fake at fresh noise and time;
* `rectify` (L_rectify): F(z, 1, 0) on itself minus (fake - real).

What the paper leaves open, and what was chosen here:

* Equation 1 draws `t_i ~ U(t_{i-1}, 0)`, which could overshoot r; here U(t_{i-1}, r), the same
  at r = 0.
* Its first sub-step: the known velocity over `dt` (a field), as in the paper's special cases
  with t_1 = t - dt. Rows with t - r < dt learn plain flow matching: the quotient has no
  meaning there.
* The gradient carries (t - r) / dt, as equation 1 does literally (the released code drops it).
  `clip` bounds the error before that factor; off by default.
* The two subsets' losses are summed over rows and divided by the whole batch, so that lambda
  is the balance of figure 4a. Twin rows get no base loss.
* The distribution of r: uniform in [0, t], t uniform in [0, 1].
* No guidance. Equation 5, score = -(x_t + (1 - t) F) / t, is right; equation 13's sign is not.
"""

import dataclasses

import jax
import jax.numpy as jnp

from twinflow_jax.arrays import Apply, Losses, Samples, Scalar
from twinflow_jax.keys import option
from twinflow_jax.objectives import distances, path, rcgm, twin
from twinflow_jax.objectives.batch import Batch
from twinflow_jax.objectives.config import Twinned
from twinflow_jax.objectives.draws import (
    Counts,
    Draws,
    allocate,
    counts_of,
    normal,
    role_slices,
)

ROLES = ("twin", "base")


@dataclasses.dataclass(frozen=True)
class Config(Twinned):
    """Hyperparameters; the defaults are the `paper` preset."""

    form: str = "paper"
    clip: float = 0.0
    rectify_weight: float = 1.0
    twin_share: float = option(
        1 / 3, "the paper's lambda, best near 1/3 in its figure 4a; 0 is RCGM", least=0, most=1
    )
    rectify_clip: float = option(0.0, "limit on fake minus real velocities; 0 is none", least=0)

    @property
    def learns_fake(self) -> bool:
        return self.twin_share > 0


def counts(batch_size: int, config: Config) -> Counts:
    """Rows per role of a batch."""
    return allocate(batch_size, {"twin": config.twin_share, "base": 1 - config.twin_share})


def draw(
    key: jax.Array, batch_size: int, sample_shape: tuple[int, ...], config: Config
) -> Draws:
    """Everything random in one step."""
    rows = counts(batch_size, config)
    keys = jax.random.split(key, 9)
    draws = {
        "twin": twin.draw(keys[:5], rows["twin"], sample_shape),
        "base": {
            "z": normal(keys[5], rows["base"], sample_shape),
            "t": jax.random.uniform(keys[6], (rows["base"],)),
            "u": jax.random.uniform(keys[7], (rows["base"],)),
            "fractions": jax.random.uniform(keys[8], (rows["base"], config.order - 1)),
        },
    }
    return {role: draws[role] for role in ROLES if rows[role]}


def loss(
    apply: Apply, params, teacher_params, batch: Batch, draws: Draws, config: Config,
    totals: Counts | None = None,
) -> tuple[Scalar, dict[str, Scalar]]:
    """The paper's loss and its terms by name; arguments as in twinflow.loss."""
    rows = counts_of(draws, ROLES)
    total = sum((totals or rows).values())
    at = role_slices(rows)
    take = lambda role: jax.tree.map(lambda a: a[at[role]], batch.cond)
    terms = {}
    if rows["twin"]:
        twins = twin.targets(apply, params, draws["twin"], take("twin"), config.rectify_clip)
        terms |= {name: distances.l2(*pair) for name, pair in twins.items()}
        terms["rectify"] *= config.rectify_weight
    if rows["base"]:
        teacher = jax.lax.stop_gradient(teacher_params)
        terms["base"] = base_term(
            apply, params, teacher, batch.x[at["base"]], draws["base"], take("base"), config
        )
    terms = {name: jnp.sum(per_row) / total for name, per_row in terms.items()}
    return sum(terms.values()), terms


def base_term(
    apply: Apply, params, teacher, x: Samples, draws, cond, config: Config
) -> Losses:
    """Equation 1 of each base row, its gradient factor (t - r) / dt included."""
    z, t = draws["z"], draws["t"]
    r = t - draws["u"] * t
    x_t, v = path.interpolate(x, z, t), path.velocity(x, z)
    v_pred = apply(params, x_t, t, r, cond)
    times = rcgm.random_times(jnp.maximum(t - config.dt, r), r, draws["fractions"])
    jumps = rcgm.integrate(apply, teacher, x_t - config.dt * v, times, cond)
    error = rcgm.error(jax.lax.stop_gradient(v_pred), jumps, v, t, r, config.dt)
    factor = jnp.where(t < r + config.dt, 1.0, (t - r) / config.dt)
    scaled = path.expand(factor, v_pred) * v_pred
    return distances.l2(
        scaled, jax.lax.stop_gradient(scaled) - path.clip(error, config.clip)
    )

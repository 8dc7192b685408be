"""TwinFlow as its MNIST tutorial writes it: five full-batch losses with plain L2.

With v* the velocity target (guided at (x_t, t) for every t) and x_fake = z - F(z, 1, 0) made
from the SAME z as x_t, the loss is the sum of five means over the whole batch:

1. `rcgm`: RCGM for F(x_t, t, r), t ~ U(0, 1), r = t - U t;
2. `velocity`: F(x_t, t, t) on v*;
3. `adversarial`: F(x', -t, -t) on z - x_fake at x' = t z + (1 - t) x_fake;
4. `rectify`: F(z, 1, 0) on itself minus (fake - real), with fresh noise and times, no clip;
5. `one_step`: RCGM for F(z, 1, 0) from z, reusing v*.

Loss 1 alone (`twin=False`) is the tutorial's RCGM baseline. It costs 12 forwards of the batch
at order 2 with guidance, 4 of them with gradient: a teaching form, not a fast one.

Source: tutorials/mnist/methodes.py of the released code.
"""

import dataclasses

import jax
import jax.numpy as jnp

from twinflow_jax.arrays import Apply, Scalar
from twinflow_jax.keys import option
from twinflow_jax.objectives import distances, path, rcgm, twin
from twinflow_jax.objectives.batch import Batch
from twinflow_jax.objectives.config import Twinned
from twinflow_jax.objectives.draws import Counts, Draws, normal, rows_of
from twinflow_jax.objectives.passes import concatenate

ROLES = ("all",)


@dataclasses.dataclass(frozen=True)
class Config(Twinned):
    """Hyperparameters; the defaults are the `tutorial` preset."""

    form: str = "tutorial"
    twin: bool = option(True, "False leaves the tutorial's RCGM baseline")
    guidance: float = option(
        0.5, "classifier-free guidance built into the velocity target; 0 is none", least=0
    )
    rectify_weight: float = 1.0

    @property
    def learns_fake(self) -> bool:
        return self.twin


def counts(batch_size: int, config: Config) -> Counts:
    """Rows per role of a batch: the tutorial has one role."""
    return {"all": batch_size}


def draw(
    key: jax.Array, batch_size: int, sample_shape: tuple[int, ...], config: Config
) -> Draws:
    """Everything random in one step."""
    keys = jax.random.split(key, 5)
    draws = {
        "z": normal(keys[0], batch_size, sample_shape),
        "t": jax.random.uniform(keys[1], (batch_size,)),
        "u": jax.random.uniform(keys[2], (batch_size,)),
    }
    if config.twin:
        draws["z_rectify"] = normal(keys[3], batch_size, sample_shape)
        draws["t_rectify"] = jax.random.uniform(keys[4], (batch_size,))
    return {"all": draws}


def loss(
    apply: Apply, params, teacher_params, batch: Batch, draws: Draws, config: Config,
    totals: Counts | None = None,
) -> tuple[Scalar, dict[str, Scalar]]:
    """The tutorial's loss and its terms by name; arguments as in twinflow.loss."""
    total = (totals or {"all": rows_of(draws, "all")})["all"]
    mean = lambda per_row: jnp.sum(per_row) / total
    frozen = jax.lax.stop_gradient(params)
    teacher = jax.lax.stop_gradient(teacher_params)
    mine, cond = draws["all"], batch.cond
    z, t = mine["z"], mine["t"]
    r = t - mine["u"] * t
    x_t, v = path.interpolate(batch.x, z, t), path.velocity(batch.x, z)
    if config.guidance:
        with_cond, without = twin.instantaneous_pair(
            apply, teacher, x_t, (t, t), (cond, batch.null_cond)
        )
        v = v + config.guidance * (with_cond - without)

    if not config.twin:
        v_pred = apply(params, x_t, t, r, cond)
        target = rcgm.target(apply, teacher, v_pred, x_t, v, t, r, cond, config)
        terms = {"rcgm": mean(distances.l2(v_pred, target))}
        return terms["rcgm"], terms

    # One call for the three predictions that do not need each other, and one chain of
    # sub-steps for both RCGM targets.
    rows, one = x_t.shape[0], jnp.ones_like(t)
    zero = jnp.zeros_like(t)
    v_all = apply(
        params,
        jnp.concatenate([x_t, z, x_t]),
        jnp.concatenate([t, one, t]),
        jnp.concatenate([r, zero, t]),
        concatenate(cond, cond, cond),
    )
    v_jump, v_one, v_now = v_all[:rows], v_all[rows : 2 * rows], v_all[2 * rows :]
    targets = rcgm.target(
        apply, teacher, v_all[: 2 * rows], jnp.concatenate([x_t, z]), jnp.concatenate([v, v]),
        jnp.concatenate([t, one]), jnp.concatenate([r, zero]), concatenate(cond, cond), config,
    )

    x_fake = jax.lax.stop_gradient(z - v_one)
    v_fake = apply(params, path.interpolate(x_fake, z, t), -t, -t, cond)
    gap = twin.fake_minus_real(apply, frozen, x_fake, mine["z_rectify"], mine["t_rectify"], cond)
    terms = {
        "rcgm": mean(distances.l2(v_jump, targets[:rows])),
        "velocity": mean(distances.l2(v_now, v)),
        "adversarial": mean(distances.l2(v_fake, path.velocity(x_fake, z))),
        "rectify": config.rectify_weight
        * mean(distances.l2(v_one, jax.lax.stop_gradient(v_one - gap))),
        "one_step": mean(distances.l2(v_one, targets[rows:])),
    }
    return sum(terms.values()), terms

"""One optimizer step as a pure function of (state, data)."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from twinflow_jax import parallel, seeds
from twinflow_jax.arrays import Apply
from twinflow_jax.config import Train
from twinflow_jax.models.int8 import dequantised
from twinflow_jax.objectives import STUDENT, Batch, Objective
from twinflow_jax.objectives.draws import Draws, counts_of
from twinflow_jax.training import ema, optimizers
from twinflow_jax.training.state import Auxiliary, TrainState, trained, whole


def micro_batches(
    objective: Objective, batch: Batch, draws: Draws, micro_steps: int
) -> list[tuple[Batch, Draws]]:
    """The batch in consecutive parts of equal size, as (batch, draws) pairs.

    Rows stand in role order, so with several parts the roles rotate over them; a part may
    hold a single row.
    """
    rows = batch.x.shape[0]
    size = rows // micro_steps
    assert size * micro_steps == rows  # config.Run refuses others
    return [
        (
            jax.tree.map(lambda a: a[start : start + size], batch),  # noqa: B023
            objective.cut(draws, start, start + size),
        )
        for start in range(0, rows, size)
    ]


def loss_and_gradient(
    objective: Objective, apply: Apply, networks: Mapping[str, Any], teacher_params, batch: Batch,
    draws: Draws, micro_steps: int = 1, strategy: parallel.Strategy | None = None,
    fixed: tuple[str, ...] = (),
):
    """`((loss, terms), gradients)` of a whole batch, computed in micro-steps.

    The same value and gradient for any micro_steps: each part is normalised by the whole
    batch's rows per role. Consecutive parts with the same rows per role run in one scan.
    networks: weights by name, the student's and the auxiliary ones'; gradients: of those that
    learn.
    teacher_params: None where the teacher is the student. strategy: of the weights on a mesh.
    fixed: see TrainState; those weights have no gradient.
    """
    roles = objective.form.ROLES
    totals = counts_of(draws, roles)
    hold, weights = lambda params: None, lambda params, held: params
    if strategy is not None:
        hold, weights = strategy.hold, strategy.weights
    held = {name: hold(params) for name, params in networks.items()}
    learned = {name: trained(networks[name], fixed) for name in objective.learns}
    teacher = None if teacher_params is None else weights(teacher_params, hold(teacher_params))

    still = {
        name: weights(params, held[name]) for name, params in networks.items()
        if name not in learned
    }

    def part(batch: Batch, draws):
        def loss(learned):
            given = still | {
                name: weights(whole(part, networks[name]), held[name])
                for name, part in learned.items()
            }
            student = given if objective.config.auxiliary else given[STUDENT]
            theirs = student if teacher is None else teacher
            return objective.loss(apply, student, theirs, batch, draws, totals)

        value, gradient = jax.value_and_grad(loss, has_aux=True)(learned)
        # In float32 also where weights are kept in less: half the digits are no sum.
        return value, jax.tree.map(lambda a: a.astype(jnp.float32), gradient)

    if micro_steps == 1:
        return part(batch, draws)

    gradient = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), learned)
    loss, terms = jnp.float32(0), {}
    pieces = micro_batches(objective, batch, draws, micro_steps)
    for _, group in itertools.groupby(pieces, lambda piece: counts_of(piece[1], roles)):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *group)

        def add(gradient, piece):
            (part_loss, part_terms), part_gradient = part(*piece)
            return jax.tree.map(jnp.add, gradient, part_gradient), (part_loss, part_terms)

        gradient, (losses, group_terms) = jax.lax.scan(add, gradient, stacked)
        loss = loss + losses.sum()
        for name, values in group_terms.items():
            terms[name] = terms.get(name, 0.0) + values.sum()
    return (loss, terms), gradient


def make_step(
    objective: Objective, apply: Apply, optimizer: optax.GradientTransformation,
    train: Train, strategy: parallel.Strategy | None = None,
    layouts: TrainState | None = None, seed: int | jax.Array | None = None,
    auxiliary: Mapping[str, optax.GradientTransformation] = {},
) -> Callable[[TrainState, dict], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `(state, data) -> (state, metrics)`; the state's buffers are donated.

    seed: of all draws, in place of `train.seed`; may be traced. strategy: of the weights on a
    mesh, whose `applied` it is then to be traced in. layouts: of the state there. auxiliary: the
    optimizers of the objective's auxiliary networks.
    data: {"x": (B, ...), "cond": pytree, "null": the condition that stands for none, of one row
    (not needed for "permuted")}, and "noise" of pairs. metrics: the loss, each of its terms under
    `loss/NAME`, gradient norm (before clipping, of all that learn) and the student's parameter norm
    (after the update).
    Released order: the teacher takes in the weights from before this step's update. Averages move
    where the student learns.
    All randomness is `fold_in(seed, step)`, so a run can stop and resume anywhere.
    """

    def step(state: TrainState, data: dict):
        of_run = seeds.key(train.seed) if seed is None else jax.random.key(seed)
        key = jax.random.fold_in(of_run, state.step)
        draw_key, null_key, drop_key = jax.random.split(key, 3)
        round_key = jax.random.fold_in(key, 3)
        x, cond = data["x"], data["cond"]
        rows = x.shape[0]
        draws = objective.draw(draw_key, rows, x.shape[1:])
        empty = jax.tree.map(
            lambda a: jnp.broadcast_to(a, (rows, *a.shape[1:])), data.get("null", {})
        )
        if train.unconditional == "permuted":
            order = jax.random.permutation(null_key, rows)
            null = jax.tree.map(lambda a: a[order], cond)
        else:
            null = empty
        if train.condition_dropout:
            dropped = jax.random.bernoulli(drop_key, train.condition_dropout, (rows,))
            cond = jax.tree.map(
                lambda none, given: jnp.where(
                    dropped.reshape((rows,) + (1,) * (given.ndim - 1)), none, given
                ),
                empty, cond,
            )

        steps = None
        if objective.config.counts_steps:
            steps = jnp.full((rows,), state.step - train.flow_matching_steps)
        decay = objective.config.teacher_decay
        teacher, learned = state.teacher, trained(state.params, state.fixed)
        if teacher is not None and decay < 1 and STUDENT in objective.learns:
            teacher = ema.update(teacher, learned, decay)
        theirs = None if teacher is None else whole(teacher.params, state.params)
        networks = {STUDENT: state.params} | {
            name: whole(state.auxiliary[name].params, state.params)
            for name in objective.config.auxiliary
        }
        (loss, terms), gradients = loss_and_gradient(
            objective, apply, networks, theirs,
            Batch(x, cond, null, steps, data.get("noise")), draws,
            train.micro_steps, strategy, state.fixed,
        )

        def update(key, chosen, gradient, learned, opt_state):
            weights = jax.tree.map(lambda a: a.astype(jnp.float32), learned)
            updates, opt_state = chosen.update(gradient, opt_state, weights)
            return optimizers.apply_updates(key, learned, updates), opt_state

        opt_state, average = state.opt_state, state.average
        if STUDENT in objective.learns:
            learned, opt_state = update(
                round_key, optimizer, gradients[STUDENT], learned, opt_state
            )
            if average is not None:
                average = ema.update(average, learned, train.ema_decay)
        others = dict(state.auxiliary)
        for number, name in enumerate(objective.config.auxiliary):
            if name in objective.learns:
                key = jax.random.fold_in(round_key, number)
                others[name] = Auxiliary(
                    *update(key, auxiliary[name], gradients[name], *others[name])
                )
        params = whole(learned, state.params)
        metrics = {f"loss/{name}": value for name, value in terms.items()} | {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradients),
            "parameter_norm": optax.tree.norm(dequantised(params, "float32")),
        }
        done = state.step + 1
        changed = {"params": params, "opt_state": opt_state, "teacher": teacher, "average": average}
        return dataclasses.replace(state, step=done, auxiliary=others, **changed), metrics

    outputs = None if layouts is None else (layouts, None)
    return jax.jit(step, donate_argnums=0, out_shardings=outputs)
